"""Routing recorded under one layout is what another one records, and a run that replays its own routing is the same
run, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny import OPTIM, SEQUENCE
from conf.schema import ParallelConfig
from parallel.env import World
from tests.parallel.helpers import MICRO_BATCH, MICRO_BATCHES, Variant, build_engine, my_batches, started

NOISY = Variant(
    {"recompute": ["moe"]},
    {"num_experts": 8, "every": 2, "jitter": 0.1, "drop_policy": "random", "num_shared_experts": 1},
)
PLANNED = Variant({"recompute": ["full"]}, {"load_balancing": "sinkhorn", "drop_policy": "probability"})
LIMIT = 400.0
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2 +sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "ep2": (2, {"ep": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
}


def record_and_replay(world: World, degrees: dict[str, Any], recorded: list[tuple[Tensor, Tensor]] | None) -> list[Any]:
    """Of each variant: the routing [sequences, S, L, K] of a step, which of it was kept, the sum of its gates, and
    whether the same step with both forced is the same one (rank function).

    Args:
        recorded: what another layout recorded, to be replayed instead.
    """
    from moe.router_replay import RouterReplayRecorder

    found = []
    with started(world, ParallelConfig(**degrees)) as runtime:
        for number, variant in enumerate((NOISY, PLANNED)):
            engine, batches = build_engine(runtime, variant, OPTIM), my_batches(runtime, 0)
            recorder = RouterReplayRecorder(variant.config(), runtime, weights=True)
            results, replayed = [], batches
            for forced in (False, True):
                loss = engine.forward_backward(replayed if forced else batches, step=1, recorder=recorder)
                parameters = (p for module in engine.modules for p in module.parameters() if p.requires_grad)
                results.append([loss, *(p.main_grad.clone() for p in parameters)])
                experts, kept, gates = recorder.collect(len(batches), MICRO_BATCH, SEQUENCE)
                sources = (experts, kept) if recorded is None else recorded[number]
                groups = (-1, runtime.groups.dp.size(), MICRO_BATCH)
                mine = zip(*(t.unflatten(0, groups)[:, runtime.groups.dp.rank()] for t in sources), strict=True)
                fields = [{"routing": r.long(), "routing_kept": k} for r, k in mine]
                replayed = [b | replay for b, replay in zip(batches, fields, strict=True)]
                assert gates is not None
                if not forced:
                    first = experts, kept, gates.double().sum().item()
            results = [(*r, *of) for r, of in zip(results, (first[:2], (experts, kept)), strict=True)]
            found.append((*first, all(torch.equal(a, b) for a, b in zip(*results, strict=True))))
    return found


@pytest.fixture(scope="module")
def one_rank(ranks) -> list[Any]:
    return ranks.run(1, record_and_replay, {}, None, timeout=LIMIT)[0]


def test_one_rank_replays_its_own_routing(one_rank):
    for experts, kept, _, same in one_rank:
        assert same and len(experts) == MICRO_BATCHES * MICRO_BATCH
        assert kept.shape == experts.shape and 0 < kept.sum() < kept.numel()
    assert [experts.shape[2] for experts, *_ in one_rank] == [2, 4]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_records_and_replays_what_one_rank_recorded(name, ranks, one_rank):
    size, degrees = LAYOUTS[name]
    recorded = [(experts, kept) for experts, kept, _, _ in one_rank]
    for rank in ranks.run(size, record_and_replay, degrees, recorded, timeout=LIMIT):
        for (experts, kept, gates, same), (wanted, wanted_kept, wanted_gates, _) in zip(rank, one_rank, strict=True):
            assert torch.equal(experts, wanted) and torch.equal(kept, wanted_kept)
            assert gates == pytest.approx(wanted_gates, rel=1e-6)
            assert same
