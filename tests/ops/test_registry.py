"""An optional package is used only when it computes the same. Stand-ins for Apex and TransformerEngine show it."""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ParallelConfig
from ops import registry
from ops.registry import Choice
from parallel.checkpoint import Checkpointer
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.parallel.helpers import Variant, build_engine, optimizer_tensors, started, state, train

CPU = torch.device("cpu")
TE, APEX = "transformer_engine.pytorch.optimizers", "apex.optimizers"


class FusedAdam(torch.optim.Optimizer):
    """AdamW as Apex and TransformerEngine keep it: not torch's class, and one step counter per group."""

    wrong_by = 0.0

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: Any,
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            lr = group["lr"] * (1 + self.wrong_by)
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                kept["exp_avg"].lerp_(p.grad, 1 - b1)
                kept["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                mean = kept["exp_avg"] / (1 - b1 ** group["step"])
                root = (kept["exp_avg_sq"] / (1 - b2 ** group["step"])).sqrt()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * mean / (root + group["eps"]))


class WrongAdam(FusedAdam):
    wrong_by = 0.01


class BrokenAdam(FusedAdam):
    def step(self) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")


@pytest.fixture
def install(monkeypatch) -> Callable[..., None]:
    """install("package.module", name=object): importable from now on, until the end of the test."""

    def install(path: str, **names: Any) -> None:
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
        vars(sys.modules[path]).update(names)

    return install


@pytest.fixture
def built(runtime) -> Callable[[type], type]:
    """What Megatron-Core builds when it is given a class of optimizer."""

    def built(adam: type) -> type:
        return type(build_engine(runtime, Variant(), adam=adam).optimizer.chained_optimizers[0].optimizer)

    return built


def without(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")


def test_nothing_installed(built):
    without("transformer_engine"), without("apex")
    adam, choice = registry.select_adam(CPU)
    assert (choice.part, choice.name) == ("optimizer", "torch AdamW, fused")
    assert choice.why == "not installed: TransformerEngine FusedAdam, Apex FusedAdam" and not choice.refused
    assert built(adam) is torch.optim.AdamW


@pytest.mark.parametrize("module, name", [(TE, "TransformerEngine FusedAdam"), (APEX, "Apex FusedAdam")])
def test_an_adam_that_computes_the_same_is_used(built, install, module, name):
    install(module, FusedAdam=FusedAdam)
    adam, choice = registry.select_adam(CPU)
    assert choice.name == name and choice.why.startswith("equals torch's within") and not choice.refused
    assert built(adam) is FusedAdam


def test_an_adam_that_is_one_percent_off_is_left_out(built, install):
    install(APEX, FusedAdam=WrongAdam)
    adam, choice = registry.select_adam(CPU)
    assert choice.name == "torch AdamW, fused"
    assert "Apex FusedAdam differs from torch's by" in choice.why and "left out" in choice.why and choice.refused
    assert built(adam) is torch.optim.AdamW


def test_a_wrong_one_does_not_hide_a_right_one(built, install):
    install(TE, FusedAdam=WrongAdam)
    install(APEX, FusedAdam=FusedAdam)
    adam, choice = registry.select_adam(CPU)
    assert choice.name == "Apex FusedAdam"
    assert built(adam) is FusedAdam


def test_an_adam_that_fails_its_trial_is_left_out(built, install):
    install(TE, FusedAdam=BrokenAdam)
    adam, choice = registry.select_adam(CPU)
    assert "TransformerEngine FusedAdam failed its trial (RuntimeError)" in choice.why
    assert built(adam) is torch.optim.AdamW


def test_a_package_that_breaks_on_import_is_named(built, tmp_path, monkeypatch):
    """A transformer-engine wheel without its torch extension raises RuntimeError, not ImportError."""
    without("transformer_engine")
    package = tmp_path / "transformer_engine"
    package.mkdir()
    Path(package / "__init__.py").write_text('raise RuntimeError("found no extension")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    adam, choice = registry.select_adam(CPU)
    assert choice.why == "TransformerEngine FusedAdam does not import (RuntimeError)"
    assert built(adam) is torch.optim.AdamW


def test_training_and_resuming_with_a_fused_adam(runtime, install, tmp_path):
    torchs = build_engine(runtime, Variant())
    wanted = train(torchs, range(4))
    install(APEX, FusedAdam=FusedAdam)
    adam, _ = registry.select_adam(CPU)
    engine = build_engine(runtime, Variant(), adam=adam)
    told = train(engine, range(2))
    saved = Checkpointer(tmp_path, engine, keep=1).save(state(2))
    engine = build_engine(runtime, Variant(), adam=adam)
    Checkpointer(tmp_path, engine, keep=1).load(saved)
    told += train(engine, range(2, 4))
    for got, reference in zip(told, wanted, strict=True):
        assert got == pytest.approx(reference, rel=1e-5)
    for kind, tensors in optimizer_tensors(torchs).items():
        for name, tensor in optimizer_tensors(engine)[kind].items():
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-6)


def apex_norm(scale_output: float = 1.0, scale_gradient: float = 1.0) -> Callable[..., Tensor]:
    def fused_rms_norm_affine(x: Tensor, weight: Tensor, shape: Any, eps: float) -> Tensor:
        assert tuple(shape) == tuple(weight.shape)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * scale_output
        return y.detach() + scale_gradient * (y - y.detach())

    return fused_rms_norm_affine


NORM = "apex.normalization.fused_layer_norm"


def test_a_norm_that_computes_the_same_is_used(install):
    install(NORM, fused_rms_norm_affine=apex_norm())
    norm, choice = registry.select_norm(CPU, torch.float32, [32])
    assert choice.name == "Apex"
    x, weight = torch.randn(3, 32), torch.rand(32)
    torch.testing.assert_close(norm(x, weight, 1e-3), registry.torch_rms_norm(x, weight, 1e-3))


@pytest.mark.parametrize("scales", [(1.01, 1.0), (1.0, 1.01), (float("nan"), 1.0)], ids=["output", "gradient", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_off_is_left_out(install, scales, dtype):
    if dtype == torch.bfloat16:
        scales = tuple(1 + 3 * (s - 1) for s in scales)  # bf16 itself rounds by up to 0.4 %
    install(NORM, fused_rms_norm_affine=apex_norm(*scales))
    norm, choice = registry.select_norm(CPU, dtype, [32])
    assert norm is registry.torch_rms_norm and "Apex differs from torch's" in choice.why


def test_a_norm_is_tried_at_every_width_that_it_is_for(install):
    """Of the hidden size and, with qk_norm, of a head."""
    right, off = apex_norm(), apex_norm(1.01)
    install(NORM, fused_rms_norm_affine=lambda x, *how: (off if x.shape[-1] == 6 else right)(x, *how))
    assert registry.select_norm(CPU, torch.float32, [32])[1].name == "Apex"
    norm, choice = registry.select_norm(CPU, torch.float32, [32, 6])
    assert norm is registry.torch_rms_norm and "Apex differs from torch's" in choice.why


def test_torchs_norm_is_the_formula():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    for row, got in zip(x, registry.torch_rms_norm(x, weight, 0.1), strict=True):
        mean_square = sum(v * v for v in row.tolist()) / 8
        wanted = [v / (mean_square + 0.1) ** 0.5 * w for v, w in zip(row.tolist(), weight.tolist(), strict=True)]
        assert got.tolist() == pytest.approx(wanted, rel=1e-12)


def agree(world: World) -> dict[str, tuple[str, str]]:
    """Of two implementations, one is on the first rank alone (rank function)."""
    with started(world, ParallelConfig()):
        name = "native" if world.rank == 0 else "torch, in blocks"
        losses = ("fast here", Choice("loss", name, "")), "slow"
        norm = ("fast", Choice("norm", "native", "")), "slow"
        agreed = registry.agreed({"losses": losses, "norm": norm})
        return {key: (implementation, choice.why) for key, (implementation, choice) in agreed.items()}


def test_ranks_that_differ_take_torch(ranks: RankPool) -> None:
    """Else one would wait for messages that another never sends."""
    why = "nodes differ in what they have: native, torch, in blocks"
    assert ranks.run(2, agree, timeout=120) == [{"losses": ("slow", why), "norm": ("fast", "")}] * 2
