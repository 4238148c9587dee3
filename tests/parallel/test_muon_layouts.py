"""Muon under other layouts: weights and momenta, checkpoints, and what is on which rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.schema import OptimConfig, ParallelConfig
from parallel import whole_matrices
from parallel.checkpoint import Checkpointer
from parallel.checkpoint_manifest import read_manifest
from parallel.distributed_optimizer import Overlap
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.optimizer_state import _optimizer_shards
from parallel.whole_matrices import rounds_of, units_of
from tests.parallel.helpers import OPTIM, Variant, build_engine, optimizer_tensors, started, state, train
from tests.parallel.test_muon import LATENT
from tests.parallel.test_optimizer_state import assert_same_bits

MUON = replace(OPTIM, name="muon", weight_decay=0.1)
SMALL = replace(MUON, state_dtype="bf16", grad_dtype="bf16", cpu_offload=True)
# Neither half of the parameters, nor of the experts', ends between two matrices.
TINY = Variant({"activation": "swiglu", "ffn_hidden_size": 44}, {"every": 4, "expert_bias": True})
BF16 = replace(TINY, dtype=torch.bfloat16)
LAYOUTS = {
    "tp2 ep2 +sequence": (2, {"tp": 2, "ep": 2, "sequence_parallel": True}),
    "dp2 +overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "pp2 vpp2 dp2": (4, {"pp": 2, "vpp": 2}),
    "cp2 tp2 etp2": (4, {"cp": 2, "tp": 2, "etp": 2}),
    "dp4": (4, {}),
}


def trained(
    world: World, parallel: ParallelConfig, variant: Variant, optim: OptimConfig, round_size: int = 2**26
) -> tuple[Any, Any]:
    """(loss and norm of four steps, the optimizer's tensors) as rank function."""
    whole_matrices.ROUND = round_size
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, variant, optim, Overlap.of(parallel, runtime.backend))
        return train(engine, range(4)), optimizer_tensors(engine)


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, tuple[Any, Any]]:
    """What one rank comes to."""
    kinds = {
        "swiglu": (TINY, MUON),
        "latent": (LATENT, MUON),
        "bf16 moments": (TINY, replace(MUON, state_dtype="bf16")),
    }
    return {name: ranks.run(1, trained, ParallelConfig(), *kind, timeout=60)[0] for name, kind in kinds.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_same_weights_and_momenta(ranks: RankPool, alone: dict[str, Any], name: str) -> None:
    size, degrees = LAYOUTS[name]
    for kind, variant in (("swiglu", TINY), ("latent", LATENT)):
        reported, wanted = alone[kind]
        # Rounds of a few matrices, and of one.
        every = ranks.run(size, trained, ParallelConfig(**degrees), variant, MUON, 4096, timeout=120)
        again, got = every[0]
        np.testing.assert_allclose(again, reported, rtol=1e-5)
        assert set(got) == {"weights", "momentum_buffer", "exp_avg", "exp_avg_sq"}
        for tensors in wanted:
            assert got[tensors].keys() == wanted[tensors].keys()
            for key, whole in wanted[tensors].items():
                assert (got[tensors][key] - whole).norm() <= 2e-5 * whole.norm(), (kind, tensors, key)


def test_momenta_in_bf16_are_the_same_under_another_layout(ranks: RankPool, alone: dict[str, Any]) -> None:
    """A few are rounded to the other neighbour, as sums of gradients differ in their last bits."""
    reported, wanted = alone["bf16 moments"]
    layout = ParallelConfig(tp=2, ep=2)
    again, got = ranks.run(2, trained, layout, TINY, replace(MUON, state_dtype="bf16"), timeout=60)[0]
    np.testing.assert_allclose(again, reported, rtol=1e-4)
    pairs = [(got["momentum_buffer"][key], whole) for key, whole in wanted["momentum_buffer"].items()]
    different = torch.cat([(mine != whole).flatten() for mine, whole in pairs])
    assert different.float().mean() < 0.01
    fp32 = alone["swiglu"][1]["momentum_buffer"]
    off = [(whole - fp32[key]).norm() / fp32[key].norm() for key, whole in wanted["momentum_buffer"].items()]
    assert 1e-4 < max(off) < 2**-6


def test_offload_changes_no_bit(ranks: RankPool) -> None:
    plain = replace(MUON, clip_grad=0.5, state_dtype="bf16", grad_dtype="bf16")
    reported, wanted = ranks.run(2, trained, ParallelConfig(ep=2), BF16, plain, timeout=60)[0]
    again, got = ranks.run(2, trained, ParallelConfig(ep=2), BF16, replace(plain, cpu_offload=True), timeout=60)[0]
    assert again == reported and min(norm for _, norm in reported) > 0.5
    assert_same_bits(got, wanted)


def saved(world: World, parallel: ParallelConfig, root: Path, variant: Variant, optim: OptimConfig) -> dict[str, Any]:
    """Three steps, a checkpoint, two more steps."""
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, variant, optim)
        train(engine, range(3))
        Checkpointer(root, engine, keep=2).save(state(3, world.size))
        kept = optimizer_tensors(engine)
        return {"kept": kept, "reported": train(engine, range(3, 5)), "end": optimizer_tensors(engine)}


def resumed(world: World, parallel: ParallelConfig, root: Path, variant: Variant, optim: OptimConfig) -> dict[str, Any]:
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, variant, optim)
        Checkpointer(root, engine, keep=2).resume(pytest.fail)
        kept = optimizer_tensors(engine)
        return {"kept": kept, "reported": train(engine, range(3, 5)), "end": optimizer_tensors(engine)}


@pytest.mark.parametrize(("variant", "optim"), [(TINY, MUON), (BF16, SMALL)], ids=["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits_and_opens_under_other_layouts(
    ranks: RankPool, tmp_path: Path, variant: Variant, optim: OptimConfig
) -> None:
    size, degrees = LAYOUTS["tp2 ep2 +sequence"]
    before = ranks.run(size, saved, ParallelConfig(**degrees), tmp_path, variant, optim, timeout=120)[0]
    after = ranks.run(size, resumed, ParallelConfig(**degrees), tmp_path, variant, optim, timeout=120)[0]
    assert after["reported"] == before["reported"]
    for when in ("kept", "end"):
        assert_same_bits(after[when], before[when])
    for size, degrees in ((1, {}), LAYOUTS["pp2 vpp2 dp2"]):
        other = ranks.run(size, resumed, ParallelConfig(**degrees), tmp_path, variant, optim, timeout=120)[0]
        assert_same_bits(other["kept"], before["kept"])
        # bf16 rounds differently under another layout, and a few tokens then choose another expert.
        np.testing.assert_allclose(other["reported"], before["reported"], rtol=1e-5 if variant is TINY else 2e-2)


def test_a_checkpoint_has_one_tensor_of_a_matrix_and_no_other_optimizer_takes_it(runtime: Any, tmp_path: Path) -> None:
    roots = {"muon": tmp_path / "muon", "adamw": tmp_path / "adamw"}
    for name, root in roots.items():
        engine = build_engine(runtime, TINY, replace(MUON, name=name))
        train(engine, range(1))
        Checkpointer(root, engine, keep=1).save(state(1))
    kinds: dict[str, set[str]] = {}
    for key in read_manifest(roots["muon"] / "step_00000001")["tensors"]:
        kind, _, name = key.partition(".")
        kinds.setdefault(name, set()).add(kind)
    kinds = {name: found for name, found in kinds.items() if "weights" in found}
    by_muon = {name for name, found in kinds.items() if found == {"weights", "momentum_buffer"}}
    by_adamw = {name for name, found in kinds.items() if found == {"weights", "exp_avg", "exp_avg_sq"}}
    assert by_muon | by_adamw == set(kinds) and len(by_muon) == 4 * 2 + 3 * 3 + 2
    assert {"embedding.weight", "head.weight", "final_norm.weight", "layers.3.ffn.router.weight"} <= by_adamw
    for name, other in (("muon", "adamw"), ("adamw", "muon")):
        engine = build_engine(runtime, TINY, replace(MUON, name=name))
        with pytest.raises(ValueError, match=f"of another optimizer, which keeps .*; optim.name={name} keeps"):
            Checkpointer(roots[other], engine, keep=1).load(roots[other] / "step_00000001")


def owners(world: World, parallel: ParallelConfig) -> dict[str, Any]:
    """Of the matrices outside of the experts: each one's owner and the ranks that hold it, and the largest round."""
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, TINY, MUON)
        named = {p: name for name, p in engine.modules[0].named_parameters() if p.sharding.matrices}
        dense = [p for p in named if getattr(p, "allreduce", True)]
        shards = {p: (shard.start, shard.end) for p, shard in _optimizer_shards(engine).items()}
        units = units_of(dense, shards, runtime.groups.dp_cp, runtime.groups.tp)
        reported = [(named[unit.parameter], unit.owner, unit.ranges) for unit in units]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, reported)
        assert everyone == [reported] * world.size
        whole_matrices.ROUND = 3 * 44 * 32
        rounds = rounds_of(units, runtime.groups.tp.size())
        assert sorted(map(id, units)) == sorted(id(unit) for round_ in rounds for unit in round_)
        most = max(
            sum(unit.owner == owner for unit in round_) for round_ in rounds for owner in {u.owner for u in units}
        )
        return {"reported": reported, "most": most}


def test_the_rank_that_holds_most_of_a_matrix_computes_it(ranks: RankPool) -> None:
    got = ranks.run(4, owners, ParallelConfig(tp=2), timeout=60)[0]
    for _, (data, _), ranges in got["reported"]:
        sizes = {rank: end - start for rank, (start, end) in ranges.items()}
        assert sizes[data] == max(sizes.values())
    assert {owner for _, owner, _ in got["reported"]} == {(d, t) for d in range(2) for t in range(2)}
    assert any(len(ranges) == 2 for _, _, ranges in got["reported"])  # one lies on both data-parallel ranks
    assert 1 < got["most"] <= 5  # of 32 x 32 to 44 x 32 elements
