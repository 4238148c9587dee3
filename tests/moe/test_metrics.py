"""What the log says of the routers, against counts and sums made by hand from the reference."""

import math

import numpy as np
import pytest
import torch

from conf.schema import MoeConfig
from moe.metrics import LoadStatistics, Report, collect
from moe.router_metrics import RouterPass
from ops.routing import RouterStats, Routing
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import in_float64, random, run_layer, sparse_layer, tiny

MOE = MoeConfig(num_experts=4, top_k=2, capacity_factor=0.5)


def test_collect_is_right_and_starts_a_new_interval(runtime: Runtime) -> None:
    """Layers 1 and 3 of a model, three micro-batches of ten tokens."""
    layers = {index: sparse_layer(tiny(MOE), runtime, seed=index) for index in (1, 3)}
    batches = [random(5, 2, 8, seed=seed) for seed in (10, 11, 12)]
    for layer in layers.values():
        for x_SBD in batches:
            run_layer(layer, x_SBD.to(runtime.device))
    statistics = {index: layer.statistics for index, layer in layers.items()}
    load = collect(statistics, [1, 3], 4, runtime.layout, len(batches), runtime.device)
    assert load is not None and load.layer_ids == [1, 3]
    for row, layer in enumerate(layers.values()):
        did = [
            reference.sparse_layer(x_SBD.double().flatten(0, 1), in_float64(layer), MOE, "geglu", 0.5)
            for x_SBD in batches
        ]
        choices = [e for d in did for chosen in d.experts for e in chosen]
        dropped = [not kept for d in did for tokens in d.kept for kept in tokens]
        probabilities = [p for d in did for p in d.probs_TE.flatten().tolist()]
        assert load.load_LE[row].tolist() == [choices.count(e) for e in range(4)]
        assert sum(dropped) > 0 and load.dropped_L[row] == pytest.approx(sum(dropped) / 60)
        served = [any(tokens) for d in did for tokens in d.kept]
        assert served.count(False) > 0 and load.metric("unserved_fraction")[row] == pytest.approx(
            served.count(False) / 30
        )
        weight_ED = in_float64(layer)["router.weight"]
        logits = [x_D @ w_D for x in batches for x_D in x.double().flatten(0, 1) for w_D in weight_ED]
        assert load.metric("router_logit_rms")[row] == pytest.approx(
            math.sqrt(sum(v.item() ** 2 for v in logits) / 120), rel=1e-5
        )
        assert load.metric("router_entropy")[row] == pytest.approx(
            -sum(p * math.log(p) for p in probabilities) / 30, rel=1e-5
        )
        assert load.metric("aux_loss")[row] == pytest.approx(sum(d.aux_loss.item() for d in did) / 3, rel=1e-5)
        assert load.metric("z_loss")[row] == pytest.approx(sum(d.z_loss.item() for d in did) / 3, rel=1e-5)

    again = collect(statistics, [1, 3], 4, runtime.layout, len(batches), runtime.device)
    assert again is not None
    assert len(again.reduced) == 6 and not any(np.any(value) for value in (again.load_LE, *again.reduced.values()))


def test_probabilities_of_zero_have_no_entropy(runtime: Runtime) -> None:
    statistics = LoadStatistics(2).to(runtime.device)
    one_hot_TE = torch.tensor([[1.0, 0.0]], device=runtime.device)
    zero = torch.zeros((), device=runtime.device)
    first = torch.zeros(1, 1, dtype=torch.int64, device=runtime.device)
    stats = RouterStats.of(0 * one_hot_TE, one_hot_TE, first)
    routing = Routing(one_hot_TE[:, :1], first, stats, 0 * one_hot_TE)
    statistics(Report.of(RouterPass(routing, one_hot_TE[:, :1].bool(), zero, zero, None)))
    assert statistics.sum_of("tokens") == 1 and statistics.sums.sum() == 1


def test_counts_stay_exact_past_what_fp32_holds(runtime: Runtime) -> None:
    statistics = LoadStatistics(1).to(runtime.device)
    statistics.load_E += 2.0**24
    one = torch.ones(1, 1, device=runtime.device)
    first = torch.zeros(1, 1, dtype=torch.int64, device=runtime.device)
    routing = Routing(one, first, RouterStats.of(one, one, first), one)
    statistics(Report.of(RouterPass(routing, one.bool(), one.sum(), one.sum(), None)))
    assert statistics.load_E.item() == 2**24 + 1


def test_a_dense_model_has_no_load(runtime: Runtime) -> None:
    assert collect({}, [], 0, runtime.layout, 1, runtime.device) is None
