"""How long Muon's directions take (parallel/whole_matrices.py), besides what AdamW's update of as many parameters
takes."""

from dataclasses import replace

from conf.extensions import input_projections
from conf.schema import MUON_ITERATIONS, Config
from parallel.layout import Layout
from training.memory_estimate import Matrix, Stage, matrices
from training.planner.links import Links
from training.planner.rates import Rates


def muon_seconds(config: Config, layout: Layout, stage: Stage, rates: Rates, links: Links) -> float:
    """Every matrix is computed whole, on one of the ranks that hold parts of it. In bf16, as on a GPU, from and to
    tensor-parallel shards that travel twice."""
    seconds = 0.0
    families = _whole_matrices(config, layout, stage)
    for family, axis, shards, replicas in zip(
        families, ("tp", "etp"), (layout.tp, layout.etp), layout.optimizer_ranks, strict=True
    ):
        each = [(count, _directions(rates, inner, outer)) for count, inner, outer in family if count * inner * outer]
        if each:
            # As even as whole matrices can be shared out.
            seconds += max(sum(n * one for n, one in each) / (shards * replicas), *(one for _, one in each))
        elements = sum(count * inner * outer for count, inner, outer in family)
        seconds += 2 * links.all_to_all(axis, 2 * elements / (shards * replicas))
    return seconds


def _whole_matrices(config: Config, layout: Layout, stage: Stage) -> tuple[list[Matrix], list[Matrix]]:
    """(number, rows, columns) of a stage's matrices that are orthogonalized, for linear layers and for experts."""
    model = config.model
    linear, experts = matrices(model, replace(layout, tp=1, etp=1), stage.sparse, stage.dense)
    if model.kv_lora_rank is None and config.optim.muon_split_qkv:
        (layers, d, _), *others = linear
        linear = [(layers, d, float(model.query_width)), (2 * layers, d, float(model.key_width)), *others]
    (count, d, _), w_out = experts
    return linear, [(input_projections(model.activation) * count, d, float(model.expert_width)), w_out]


def _directions(rates: Rates, inner: float, outer: float) -> float:
    """Of one matrix: three products in each iteration, over its smaller dimension."""
    small, large = sorted((inner, outer))
    return MUON_ITERATIONS * (2 * rates.dense(small, large, small) + rates.dense(small, small, small))
