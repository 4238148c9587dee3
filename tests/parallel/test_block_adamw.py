"""BlockAdamW (bf16 moments and gradients, states in host memory), compared with torch's fused AdamW."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import OptimConfig, ParallelConfig
from parallel import block_adamw, optimizer_state
from parallel.block_adamw import BlockAdamW, _Streams, _Target
from parallel.block_update import Block, random_bits, round_to_bf16, rounding_seed
from parallel.checkpoint import Checkpointer
from parallel.checkpoint_format import TensorFile
from parallel.distributed_optimizer import Overlap
from parallel.env import World
from parallel.optimizers import OPTIMIZERS
from tests.parallel.helpers import (
    OPTIM,
    Variant,
    build_engine,
    gradients,
    my_batches,
    optimizer_tensors,
    started,
    state,
    train,
)
from tests.parallel.test_optimizer_state import assert_same_bits

FP32, BF16 = Variant(), Variant(dtype=torch.bfloat16)
MOMENTS = replace(OPTIM, state_dtype="bf16")
ALL = replace(OPTIM, state_dtype="bf16", grad_dtype="bf16", cpu_offload=True)


def target(size: int) -> _Target:
    return _Target(torch.ones(size), None, "w", 0)


def bits(size: int, step: int = 1, name: str = "w", first: int = 0) -> Tensor:
    seed, x = rounding_seed(name, step), torch.empty(size)
    return random_bits(Block(x, x, {}, None, 1.0, seed, first, (), step, 1e-2, 0.1, (0.9, 0.95), 1e-8))


@pytest.mark.parametrize("shift", [0, 16])
@pytest.mark.parametrize("value", [1 + 2**-9, -(1 + 2**-9), 3e-39, -7.7e20])
def test_rounding_takes_a_neighbour_and_keeps_the_mean(value, shift):
    """1 + 2**-9 lies a quarter of the way to the next bf16 value; both halves of the random bits serve."""
    x = torch.full((2**16,), value)
    got = round_to_bf16(x, bits(len(x)) >> shift).float()
    truncated = (x.view(torch.int32) & -0x10000).view(torch.float32)[0]
    step = (torch.tensor(value).view(torch.int32) & -0x10000).add(0x10000).view(torch.float32) - truncated
    assert set(got.unique().tolist()) == {truncated.item(), (truncated + step).item()}
    share = ((value - truncated.double()) / step.double()).item()
    # Five standard deviations of a binomial share.
    assert abs((got != truncated).double().mean().item() - share) < 5 * (share * (1 - share) / len(x)) ** 0.5


def test_rounding_leaves_bf16_values_alone():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-30, 3e38]).bfloat16().float().repeat_interleave(1000)
    assert torch.equal(round_to_bf16(x, bits(len(x))).float().view(torch.int32), x.view(torch.int32))


def test_random_bits_belong_to_parameter_step_and_element():
    one = bits(1000)
    assert torch.equal(bits(400, first=300), one[300:700])
    for other in (bits(1000, step=2), bits(1000, name="v"), one.roll(1)):
        assert (other == one).sum() < 3
        # As independent as coins: of 32,000 bits half differ, within five standard deviations.
        differing = sum(((one ^ other) >> bit & 1).sum().item() for bit in range(32))
        assert abs(differing - 16_000) < 5 * 90


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_slow_second_moment_does_not_stick(dtype):
    """With beta2 = 0.999 an update is less than half a bf16 step: rounded to nearest it would end at a quarter."""
    aim, steps = target(4096), 1000
    weight = torch.zeros(4096)
    groups = [{"params": [weight], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}]
    optimizer = BlockAdamW(groups, {weight: aim}, OptimConfig(state_dtype=dtype), _Streams(False))
    for _ in range(steps):
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    assert second.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert abs(second.float().mean().item() / (1 - 0.999**steps) - 1) < 2e-3
    assert abs(weight.mean().item() / (-1e-3 * steps) - 1) < 5e-3


def test_blocks_change_no_bit(monkeypatch):
    """Nor does offload, on a shard that begins somewhere within a parameter."""
    found = []
    for size, offload in ((10**6, False), (1024, False), (1024, True)):
        monkeypatch.setattr(block_adamw, "rows_at_once", lambda *_, size=size: size)
        generator = torch.Generator().manual_seed(0)
        weight, gradient = torch.randn(5000, generator=generator), torch.randn(5000, generator=generator).bfloat16()
        model = weight.bfloat16()
        aim = _Target(gradient, model, "w", 1234)
        groups = [{"params": [weight], "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}]
        optim = OptimConfig(state_dtype="bf16", grad_dtype="bf16", cpu_offload=offload)
        optimizer = BlockAdamW(groups, {weight: aim}, optim, _Streams(False))
        optimizer.grad_scale = 0.3
        for _ in range(3):
            optimizer.step()
        found.append([weight, model, *optimizer.state[weight].values()])
        assert torch.equal(model, weight.bfloat16())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def trained(world: World, parallel: ParallelConfig, variant: Variant, optim: OptimConfig) -> tuple[Any, Any]:
    """(loss and norm of four steps, the optimizer's tensors) as rank function."""
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, variant, optim, Overlap.of(parallel, runtime.backend))
        return train(engine, range(4), masked=False), optimizer_tensors(engine)


@pytest.mark.parametrize("variant", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"state_dtype": "bf16"}], ids=["moments fp32", "moments bf16"])
def test_offload_changes_no_bit(ranks, variant, changes):
    """Against torch's fused AdamW, and against moments in bf16 that stay where they are; gradients are clipped."""
    plain = replace(OPTIM, clip_grad=0.5, **changes)
    layout = ParallelConfig(ep=2)
    told, wanted = ranks.run(2, trained, layout, variant, plain, timeout=60)[0]
    assert min(norm for _, norm in told) > 0.5
    again, got = ranks.run(2, trained, layout, variant, replace(plain, cpu_offload=True), timeout=60)[0]
    assert again == told
    assert_same_bits(got, wanted)


@pytest.fixture(scope="module")
def alone(ranks) -> dict[str, tuple[Any, Any]]:
    """What one rank comes to."""
    kinds = {"plain": (FP32, OPTIM), "moments": (FP32, MOMENTS), "plain bf16": (BF16, OPTIM)}
    return {name: ranks.run(1, trained, ParallelConfig(), *kind, timeout=60)[0] for name, kind in kinds.items()}


def test_bf16_moments_stay_near_fp32(alone):
    (told, wanted), (again, got) = alone["plain"], alone["moments"]
    np.testing.assert_allclose(again, told, rtol=2e-3)
    # Each of four steps rounds by at most 2**-8, mostly less.
    for kind, bound in (("weights", 1e-3), ("exp_avg", 2**-7), ("exp_avg_sq", 2**-7)):
        for name, whole in wanted[kind].items():
            assert (got[kind][name] - whole).norm() < bound * whole.norm(), (kind, name)


LAYOUTS = {
    "dp2 +overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2 ep2 +sequence": {"tp": 2, "ep": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_moments_are_the_same_under_every_layout(ranks, alone, name):
    """Each element is rounded by its own random number. Sums of gradients differ in their last bits, and so may the
    rounding of a few values, by a bf16 step. Copies agree (gather)."""
    told, wanted = alone["moments"]
    again, got = ranks.run(2, trained, ParallelConfig(**LAYOUTS[name]), FP32, MOMENTS, timeout=60)[0]
    np.testing.assert_allclose(again, told, rtol=2e-5)
    for kind in OPTIMIZERS["adamw"].state:
        assert got[kind].keys() == wanted[kind].keys()
        pairs = [(got[kind][key], whole) for key, whole in wanted[kind].items()]
        different = torch.cat([(mine != whole).flatten() for mine, whole in pairs])
        assert different.float().mean() < 0.01, kind
        assert all((mine - whole).norm() < 2e-3 * whole.norm() for mine, whole in pairs), kind
    for key, whole in wanted["weights"].items():
        assert (got["weights"][key] - whole).norm() < 5e-5 * whole.norm(), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_gradients_train_under_every_layout(ranks, alone, name):
    """Within what bf16 parameters allow: a few tokens choose another expert, as under fp32 gradients."""
    both = replace(OPTIM, state_dtype="bf16", grad_dtype="bf16")
    again, _ = ranks.run(2, trained, ParallelConfig(**LAYOUTS[name]), BF16, both, timeout=60)[0]
    told, _ = alone["plain bf16"]
    np.testing.assert_allclose([loss for loss, _ in again], [loss for loss, _ in told], rtol=2e-3)
    np.testing.assert_allclose([norm for _, norm in again], [norm for _, norm in told], rtol=0.1)


def test_gradient_buckets_are_in_bf16(runtime):
    """Except the router's, whose parameter is fp32; each is the fp32 sum within the rounding of four micro-batches."""
    engines = [build_engine(runtime, BF16, optim) for optim in (OPTIM, replace(OPTIM, grad_dtype="bf16"))]
    for engine in engines:
        engine.forward_backward(my_batches(runtime, 0), step=0)
    kinds = {p.main_grad.dtype for name, p in engines[1].modules[0].named_parameters() if "router" not in name}
    routers = {p.main_grad.dtype for name, p in engines[1].modules[0].named_parameters() if "router" in name}
    assert kinds == {torch.bfloat16} and routers == {torch.float32}
    wanted, got = map(gradients, engines)
    for name, whole in wanted.items():
        assert 0 < (got[name] - whole).norm() < 6e-3 * whole.norm() or "router" in name, name
    norms = [engine.update(1e-3, loss=1.0)[0] for engine in engines]
    np.testing.assert_allclose(*norms, rtol=2e-3)


def attempt(world: World, parallel: ParallelConfig, root: Path, asynchronous: bool) -> dict[str, Any]:
    """Three steps, a checkpoint, two more steps, during which an asynchronous one is still being written."""
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, BF16, ALL)
        train(engine, range(3))
        saver, kept = Checkpointer(root, engine, keep=2), optimizer_tensors(engine)
        saver.begin_save(state(3, world.size))
        if not asynchronous:
            saver.finalize_save(wait=True)
        told = train(engine, range(3, 5))
        saver.finalize_save(wait=True)
        return {"kept": kept, "told": told, "end": optimizer_tensors(engine)}


def resumed(world: World, parallel: ParallelConfig, root: Path, optim: OptimConfig) -> dict[str, Any]:
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, BF16, optim)
        Checkpointer(root, engine, keep=2).resume(pytest.fail)
        dtypes = {t.dtype for piece in optimizer_state._optimizer_shards(engine).values() for t in _moments(piece)}
        kept = optimizer_tensors(engine)
        return {"dtypes": dtypes, "kept": kept, "told": train(engine, range(3, 5)), "end": optimizer_tensors(engine)}


def _moments(piece: block_adamw.OptimizerShard) -> list[Tensor]:
    return [piece.inner.state[piece.master][name] for name in OPTIMIZERS["adamw"].state]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_resumed_run_has_the_same_bits(ranks, tmp_path, asynchronous):
    layout = ParallelConfig(**LAYOUTS["tp2 ep2 +sequence"])
    before = ranks.run(2, attempt, layout, tmp_path, asynchronous, timeout=60)[0]
    after = ranks.run(2, resumed, layout, tmp_path, ALL, timeout=60)[0]
    assert after["told"] == before["told"]
    for when in ("kept", "end"):
        assert_same_bits(after[when], before[when])


def test_a_checkpoint_is_converted_to_the_other_type_of_moments(ranks, tmp_path):
    """Under another layout: bf16 moments to fp32 exactly, and those, saved in fp32, to bf16 exactly."""
    before = ranks.run(2, attempt, ParallelConfig(tp=2, ep=2), tmp_path, False, timeout=60)[0]
    directory = tmp_path / "step_00000003"
    found = {}
    for path in directory.glob("*.safetensors"):
        with TensorFile(path) as file:
            found |= {name: entry["dtype"] for name, entry in file._header.items()}
    kinds = {name.split(".")[0]: dtype for name, dtype in found.items()}
    assert (kinds["weights"], kinds["exp_avg"], kinds["exp_avg_sq"]) == ("F32", "BF16", "BF16")
    after = ranks.run(1, resumed, ParallelConfig(), tmp_path, OPTIM, timeout=60)[0]
    assert after["dtypes"] == {torch.float32}
    assert_same_bits(after["kept"], before["kept"])


def test_fp32_moments_are_rounded_to_nearest_for_a_bf16_run(runtime, tmp_path):
    engine = build_engine(runtime, FP32)
    train(engine, range(2))
    wanted = optimizer_tensors(engine)
    Checkpointer(tmp_path, engine, keep=1).save(state(2))
    engine = build_engine(runtime, FP32, MOMENTS)
    assert Checkpointer(tmp_path, engine, keep=1).load(tmp_path / "step_00000002") == state(2)
    rounded = {kind: {n: t.bfloat16().float() for n, t in wanted[kind].items()} for kind in OPTIMIZERS["adamw"].state}
    assert_same_bits(optimizer_tensors(engine), {"weights": wanted["weights"], **rounded})
    assert optimizer_state.counted_updates(engine) == 2
    train(engine, range(2, 3))
    assert optimizer_state.counted_updates(engine) == 3


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_an_update_that_is_not_finite_leaves_everything(runtime, bad):
    engine = build_engine(runtime, BF16, ALL)
    train(engine, range(1))
    before = optimizer_tensors(engine)
    if bad == "gradient":
        name, parameter = next(iter(engine.modules[0].named_parameters()))
        parameter.main_grad.view(-1)[3] = torch.inf
        assert engine.nonfinite_gradients() == [name]
    assert engine.update(1.0, loss=1.0 if bad == "gradient" else torch.nan)[1] is False
    assert_same_bits(optimizer_tensors(engine), before)
    assert optimizer_state.counted_updates(engine) == 1
