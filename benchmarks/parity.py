"""`python -m benchmarks.parity`: verifies that every layout trains the same model. Trains a tiny model for three steps
under many layouts and compares losses, the gradient of every parameter, gradient norms, routing, drops, held-out loss
and next-token logits with those of a single rank. Prints the largest deviation of each cell; exits with 1 if any
deviates.

Runs simulated ranks on the CPU, or sharing a GPU. Legend: S steps, L sparse layers, E experts, V vocabulary.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.parity_variants import VARIANTS
from benchmarks.tiny import (
    MICRO_BATCHES,
    OPTIM,
    VOCABULARY,
    Variant,
    build_engine,
    evaluated,
    gradients,
    micro_batch,
    my_batches,
    preference_batch,
    started,
)
from conf.schema import ModelConfig, ParallelConfig
from models.logits import next_token_logits
from parallel.distributed_optimizer import Overlap
from parallel.engine import Engine
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime

LIMIT = 1e-5
"""Maximum relative deviation, from the order of fp32 sums; loads and drops must be equal."""
SECONDS = 300.0
"""Time limit per layout."""


@dataclass(frozen=True)
class Layouts:
    """Cells of the matrix: one layout with several variants of the model."""

    name: str
    ranks: int
    degrees: dict[str, Any]
    variants: list[str]
    tested: str = ""
    """The variants, separated by spaces, that the tests run as well."""


PREFERENCES = ("dpo", "reward")
IN_PARTS = ("overlap", "overlap_padded", "overlap_lora")
ENDS_ALONE = ("dropless", "switch", "mtp_documents", "muon", "reward")
SEQUENCE_PARALLEL = {"tp": 2, "sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
INSTANCES = {"optimizer_instances": 2}
EIGHT = {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}

MATRIX = [
    Layouts(
        "tp2",
        2,
        {"tp": 2},
        [
            *("drops", "switch_documents", "dense", "global", "global_bias", "qwen3", "qwen2", "olmoe", "mla"),
            *("gpt_oss", "chunks", "muon", "mtp", "llama4", "phimoe", "gated", "gated_dense", "chat", "replay"),
            *("lora", "lora_mla", "lora_dense", "dora", "dora_mla", *PREFERENCES),
        ],
        "dpo reward replay lora lora_dense dora drops global global_bias qwen2 olmoe mla chunks muon mtp llama4 phimoe "
        "gated gated_dense",
    ),
    Layouts(
        "tp2 +sequence",
        2,
        SEQUENCE_PARALLEL,
        [
            *("switch", "dropless", "deepseek", "expert_choice", "sinkhorn", "global", "global_bias", "ties"),
            *("ties_choice", "per_sequence", "qwen3", "qwen2", "olmoe", "mla", "mla_documents", "gpt_oss", "chunks"),
            *("muon_mla", "mtp_documents", "mtp_latent", "llama4", "phimoe", "gated", "lora", "lora_mla", "lora_dense"),
            *("chat_mtp", "replay", "dora", "dora_mla", *PREFERENCES),
        ],
        "deepseek expert_choice sinkhorn ties ties_choice per_sequence qwen3 olmoe mla mla_documents gpt_oss muon_mla "
        "mtp_latent gated chat_mtp replay dpo reward lora_mla dora_mla",
    ),
    Layouts(
        "pp2",
        2,
        {"pp": 2},
        [
            *("dropless", "deepseek", "dense", "qwen3", "olmoe", "mla", "gpt_oss", "muon", "mtp", "mtp_documents"),
            *(
                "llama4",
                "phimoe",
                "gated",
                "chat_mtp",
                "replay_mtp",
                "lora",
                "lora_mla",
                "lora_dense",
                "dora",
                *PREFERENCES,
            ),
        ],
        "dpo reward dropless qwen3 olmoe muon mtp mtp_documents replay_mtp lora",
    ),
    Layouts("pp2 layers 1+3", 2, {"pp": 2, "pp_layers": [1, 3]}, ["drops", "dropless"], "dropless"),
    Layouts("pp4", 4, {"pp": 4}, ["switch", "drops", "mtp"], "switch"),
    Layouts("pp3 layers 0+4+0", 3, {"pp": 3, "pp_layers": [0, 4, 0]}, [*ENDS_ALONE, "lora"], "mtp_documents"),
    Layouts("pp4 E|tt|tt|mmL +sequence", 8, {"pp": 4, "pp_layout": "E|tt|tt|mmL", **SEQUENCE_PARALLEL}, ["mtp_latent"]),
    Layouts(
        "pp2 vpp2 dp2 E|t*3|t|L +overlap", 4, {"pp": 2, "vpp": 2, "pp_layout": "E|t*3|t|L", **OVERLAP}, ["dropless"]
    ),
    Layouts("pp4 layers 1+2+2+1", 4, {"pp": 4, "pp_layers": [1, 2, 2, 1]}, ["six_layers"]),
    Layouts("pp2 vpp2", 2, {"pp": 2, "vpp": 2}, ["switch_documents", "switch", "dense", "mtp", *PREFERENCES], "switch"),
    Layouts("pp2 vpp2 layers 1+2+1+2", 2, {"pp": 2, "vpp": 2, "pp_layers": [1, 2, 1, 2]}, ["six_layers"]),
    Layouts(
        "cp2",
        2,
        {"cp": 2},
        [
            *("drops", "switch_documents", "deepseek", "sinkhorn", "qwen3", "olmoe", "rope", "mla", "mla_documents"),
            *("gpt_oss", "chunks", "mtp", "mtp_documents", "llama4", "phimoe", "gated", "chat", "chat_mtp", "replay"),
            *("lora", "lora_mla", *PREFERENCES),
        ],
        "dpo reward drops sinkhorn rope mla_documents chunks mtp_documents llama4 chat replay lora",
    ),
    Layouts(
        "cp4",
        4,
        {"cp": 4},
        ["drops", "dropless", "ties", "ties_choice", "per_sequence", "gpt_oss", "chunks"],
        "gpt_oss",
    ),
    Layouts(
        "ep2",
        2,
        {"ep": 2},
        ["switch", "dropless", "muon", "mtp", "replay", *IN_PARTS, *PREFERENCES],
        "dpo reward dropless muon mtp replay overlap overlap_lora",
    ),
    Layouts("ep4", 4, {"ep": 4}, ["drops", "deepseek", "llama4", *IN_PARTS], "deepseek llama4"),
    Layouts("etp2", 2, {"etp": 2}, ["drops", "dropless", "mtp"], "drops"),
    Layouts(
        "ep2 etp2",
        4,
        {"ep": 2, "etp": 2},
        ["dropless", "switch", "mla", "gpt_oss", "muon", "llama4", "lora", "lora_mla", *IN_PARTS],
        "dropless muon lora overlap_padded",
    ),
    Layouts(
        "dp2",
        2,
        {},
        [
            *("switch", "drops", "global", "global_bias", "muon", "mtp_documents", "chat", "chat_mtp", "replay"),
            *PREFERENCES,
        ],
        "dpo reward switch global global_bias muon chat replay",
    ),
    Layouts("dp2 +overlap", 2, OVERLAP, ["dropless", "deepseek", "lora"], "dropless lora"),
    Layouts("dp4 +overlap", 4, OVERLAP, ["switch", "dense", "muon", "muon_mla"]),
    Layouts("dp2 instances2", 2, INSTANCES, ["drops", "lora"]),
    Layouts("dp4 instances2", 4, INSTANCES, ["dropless", "global_bias", "muon", "dense"], "dropless muon"),
    Layouts("ep2 dp4 instances2", 4, {"ep": 2, **INSTANCES}, ["switch", "deepseek", "muon"], "switch"),
    Layouts("cp2 dp2 instances2", 4, {"cp": 2, **INSTANCES}, ["drops", "mtp"], "drops"),
    Layouts("tp2 etp2 dp4 instances2", 8, {"tp": 2, "etp": 2, **INSTANCES}, ["dropless", "muon_mla"]),
    Layouts("tp2 pp2 dp2 instances2", 8, {"tp": 2, "pp": 2, **INSTANCES}, ["switch", "mtp_documents"], "switch"),
    Layouts("dp4 instances4", 4, {"optimizer_instances": 4}, ["switch_documents"]),
    Layouts("tp2 pp2", 4, {"tp": 2, "pp": 2}, ["dense", "deepseek", "mtp_documents"], "dense"),
    Layouts("tp2 ep2", 2, {"tp": 2, "ep": 2}, ["switch_documents", "drops"], "switch_documents"),
    Layouts("tp2 ep2 +sequence", 2, {**SEQUENCE_PARALLEL, "ep": 2}, ["deepseek", "switch", *IN_PARTS]),
    Layouts("tp2 etp2", 2, {"tp": 2, "etp": 2}, ["drops", "switch_documents"]),
    Layouts("tp2 etp2 +sequence", 2, {**SEQUENCE_PARALLEL, "etp": 2}, ["drops", "dropless"]),
    Layouts("pp2 ep2", 4, {"pp": 2, "ep": 2}, ["switch", "deepseek", *IN_PARTS]),
    Layouts("pp2 etp2", 4, {"pp": 2, "etp": 2}, ["dropless"]),
    Layouts("pp2 dp2 +overlap", 4, {"pp": 2, **OVERLAP}, ["switch", "drops", "mtp"]),
    Layouts("pp2 vpp2 dp2 +overlap", 4, {"pp": 2, "vpp": 2, **OVERLAP}, ["dropless"]),
    Layouts("cp2 tp2", 4, {"cp": 2, "tp": 2}, ["switch_documents", "rope", "mla", "mla_documents", "muon_mla"]),
    Layouts(
        "cp2 tp2 +sequence",
        4,
        {"cp": 2, **SEQUENCE_PARALLEL},
        ["drops", "deepseek", "qwen3", "olmoe", "mla", "gpt_oss", "chunks", "mtp_documents", *PREFERENCES],
    ),
    Layouts("cp2 pp2", 4, {"cp": 2, "pp": 2}, ["dropless", "mtp_latent"]),
    Layouts("cp2 ep2", 2, {"cp": 2, "ep": 2}, ["deepseek", "switch"]),
    Layouts("cp2 dp2 +overlap", 4, {"cp": 2, **OVERLAP}, ["drops"]),
    Layouts(
        "tp2 pp2 ep2", 4, {"tp": 2, "pp": 2, "ep": 2}, ["dropless", "switch", "gpt_oss", "llama4", "phimoe"], "dropless"
    ),
    Layouts(
        "tp2 pp2 vpp2 ep2 dp2 +sequence",
        8,
        {**EIGHT, "sequence_parallel": True},
        ["switch", "drops", "mtp", "lora", "lora_mla"],
        "switch lora",
    ),
    Layouts(
        "tp2 pp2 vpp2 ep2 dp2 +overlap",
        8,
        {**EIGHT, **OVERLAP},
        ["deepseek", "muon", "mtp_documents", "chat", "overlap"],
    ),
    Layouts(
        "cp2 tp2 ep4", 8, {"cp": 2, "tp": 2, "ep": 4}, ["drops", "expert_choice", "lora_mla"], "drops expert_choice"
    ),
    Layouts("cp2 tp2 pp2", 8, {"cp": 2, "tp": 2, "pp": 2}, ["switch"]),
    Layouts(
        "cp2 tp2 pp2 +sequence",
        8,
        {"cp": 2, "pp": 2, **SEQUENCE_PARALLEL},
        ["expert_choice", "global", "global_bias", "lora"],
    ),
]


@dataclass
class Outcome:
    """The results that must agree between layouts."""

    losses: list[float]
    norms: list[float]
    load_SLE: np.ndarray
    dropped_SL: np.ndarray
    """Per step (S) and sparse layer; without axes L and E for a dense model."""
    router: list[float]
    """Entropy, auxiliary and z-loss of all steps and layers."""
    evaluation: tuple[Any, float]
    logits_V: np.ndarray
    further: list[float]
    """Losses of multi-token prediction; the metrics of preferences in every step."""
    gradients: dict[str, np.ndarray] | None
    """Gradients of step 1, on rank 0 only."""


def measure(world: World, parallel: ParallelConfig, variants: dict[str, Variant], steps: int = 3) -> dict[str, Outcome]:
    """Trains each variant for some steps, evaluates it and computes next-token logits. Runs on each rank."""
    with started(world, parallel) as runtime:
        overlap = Overlap.of(parallel, runtime.backend)
        return {name: _measure(runtime, variant, overlap, steps) for name, variant in variants.items()}


def _measure(runtime: Runtime, variant: Variant, overlap: Overlap, steps: int) -> Outcome:
    from models.mtp import collect_losses

    engine = build_engine(runtime, variant, dataclasses.replace(OPTIM, **variant.optim), overlap)
    make = preference_batch if engine.objective else micro_batch
    how = {"begin_alike": variant.begin_alike, "as_packed": variant.packed, "make": make}
    how["replayed"] = variant.config() if variant.replay else None
    batches = functools.partial(my_batches, runtime, **how)
    results, loads, first, metrics = [], [], None, []
    for step in range(steps):
        loss = engine.forward_backward(batches(step), step=step).item()
        if step == 0:
            first = gradients(engine)
        results.append((loss, engine.update(OPTIM.lr, loss=loss)[0]))
        loads.append(_expert_load(engine, variant.config()))
        metrics += engine.metrics.values()
    losses, norms = (list(column) for column in zip(*results, strict=True))
    sparse, averaged = [load for load in loads if load is not None], ("router_entropy", "aux_loss", "z_loss")
    return Outcome(
        losses,
        norms,
        np.array([load.load_LE for load in sparse]),
        np.array([load.dropped_L for load in sparse]),
        [float(x) for load in sparse for name in averaged for x in load.metric(name)],
        evaluated(engine, batches(99)),
        # 11 tokens: not divisible by the degrees of context and tensor parallelism.
        np.zeros(1) if variant.objective == "reward" else next_token_logits(engine, VOCABULARY, [*range(11)]).numpy(),
        [*collect_losses(engine.modules, variant.config().mtp_num_layers, runtime.device), *metrics],
        {name: whole.numpy() for name, whole in first.items()} if runtime.world.rank == 0 else None,
    )


def _expert_load(engine: Engine, model: ModelConfig) -> Any:
    from moe.metrics import collect

    mine = {layer: moe.statistics for module in engine.modules for layer, moe in module.sparse().items()}
    layout, device = engine.runtime.layout, engine.runtime.device
    return collect(mine, model.routed_layers, model.moe.num_experts, layout, MICRO_BATCHES, device)


def relative(got: object, wanted: object) -> float:
    """The norm of the difference relative to the norm of `wanted`."""
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30)) if wanted.size else 0.0


def deviations(got: Outcome, wanted: Outcome) -> dict[str, float]:
    """The deviations of a layout from a single rank; infinity for results that must be equal and are not."""

    def equal(same: bool) -> float:
        return 0.0 if same else float("inf")

    assert got.gradients is not None and wanted.gradients is not None
    assert got.gradients.keys() == wanted.gradients.keys()
    grads = {f"gradient of {name}": relative(got.gradients[name], g) for name, g in wanted.gradients.items()}
    return {
        "loss": max(map(relative, got.losses, wanted.losses)),
        "gradient norm": max(map(relative, got.norms, wanted.norms)),
        "expert load": equal(np.array_equal(got.load_SLE, wanted.load_SLE)),
        "drops": equal(np.array_equal(got.dropped_SL, wanted.dropped_SL)),
        "router": relative(got.router, wanted.router),
        "held-out loss": relative(got.evaluation[0], wanted.evaluation[0]),
        "held-out tokens": equal(got.evaluation[1] == wanted.evaluation[1]),
        "logits": relative(got.logits_V, wanted.logits_V),
        **({"further metrics": relative(got.further, wanted.further)} if wanted.further else {}),
        **grads,
    }


def agreement(every: list[Outcome]) -> float:
    """0 if all ranks of a layout have the same results, else infinity."""
    first = every[0]
    same = all(
        (other.losses, other.norms, other.evaluation) == (first.losses, first.norms, first.evaluation)
        and np.array_equal(other.load_SLE, first.load_SLE)
        and np.array_equal(other.logits_V, first.logits_V)
        for other in every[1:]
    )
    return 0.0 if same else float("inf")


def one_rank(pool: RankPool, variants: dict[str, Variant]) -> dict[str, Outcome]:
    return pool.run(1, measure, ParallelConfig(), variants, timeout=SECONDS)[0]


def cells(pool: RankPool, layouts: Layouts, names: list[str]) -> Iterator[tuple[str, list[Outcome]]]:
    """The outcomes of all ranks for each named variant under a layout."""
    parallel, chosen = ParallelConfig(**layouts.degrees), {name: VARIANTS[name] for name in names}
    every = pool.run(layouts.ranks, measure, parallel, chosen, timeout=SECONDS)
    for name in names:
        yield name, [rank[name] for rank in every]


def control(pool: RankPool, wanted: Outcome) -> float:
    """The smallest deviation of a model with other initial weights, which must be far above LIMIT."""
    other = one_rank(pool, {"other": dataclasses.replace(VARIANTS["drops"], seed=2)})["other"]
    found = deviations(other, wanted)
    return min(value for what, value in found.items() if what not in ("held-out tokens", "drops"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("-k", default="", metavar="TEXT", help="only layouts whose name contains this")
    wanted_name = parser.parse_args(arguments).k
    matrix = [layouts for layouts in MATRIX if wanted_name in layouts.name]
    count = sum(len(layouts.variants) for layouts in matrix)
    bad = 0
    print(f"{count} cells; largest relative deviation from a single rank, at most {LIMIT:g}")
    with RankPool(max((layouts.ranks for layouts in matrix), default=1)) as pool:
        alone = one_rank(pool, VARIANTS)
        for layouts in matrix:
            for name, every in cells(pool, layouts, layouts.variants):
                found = {**deviations(every[0], alone[name]), "agreement of the ranks": agreement(every)}
                what = max(found, key=lambda key: found[key])
                good = found[what] <= LIMIT
                bad += not good
                print(
                    f"{layouts.name:<32} {name:<17} {found[what]:8.1e}  {'' if good else 'DEVIATES '}{what}", flush=True
                )
        seen = control(pool, alone["drops"])
    print(f"{'control: other initial weights':<32} {'drops':<17} {seen:8.1e}  at least")
    insensitive = seen < 100 * LIMIT
    print(
        f"{bad} of {count} cells deviate"
        + ("; the control does not: the comparison is not sensitive" if insensitive else "")
    )
    return 1 if bad or insensitive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
