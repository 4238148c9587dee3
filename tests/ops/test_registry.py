"""An optional package is used only when it computes the same. Stand-ins for Apex and TransformerEngine show it."""

import importlib.util
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import Config, Fp8Config, OptimConfig, ParallelConfig
from ops import registry
from ops.adamw import ADAMW
from ops.norm import RMS_NORM, Norm, torch_rms_norm
from ops.operation import Implementation, Operation, Row
from ops.registry import select
from ops.run_context import RunContext
from ops.te_fp8 import TE_FP8
from parallel.checkpoint import Checkpointer
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import run_context, selected, tiny
from tests.parallel.helpers import Variant, build_engine, optimizer_tensors, started, state, train
from tests.stand_ins.fused_adam import GroupStepAdam as FusedAdam

CPU = torch.device("cpu")
TE, APEX = "transformer_engine.pytorch.optimizers", "apex.optimizers"


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


def chosen_adam(runtime: Runtime) -> tuple[type[torch.optim.Optimizer], Row]:
    return selected(ADAMW, run_context(tiny(), runtime))


def test_nothing_installed(built, runtime):
    without("transformer_engine"), without("apex")
    adam, row = chosen_adam(runtime)
    assert (row.operation, row.name) == ("optimizer", "torch AdamW, fused")
    assert row.why == "not installed: TransformerEngine FusedAdam, Apex FusedAdam" and not row.refused
    assert built(adam) is torch.optim.AdamW


@pytest.mark.parametrize("module, name", [(TE, "TransformerEngine FusedAdam"), (APEX, "Apex FusedAdam")])
def test_an_adam_that_computes_the_same_is_used(built, runtime, install, module, name):
    install(module, FusedAdam=FusedAdam)
    adam, row = chosen_adam(runtime)
    assert row.name == name and row.why.startswith("equals torch's within") and not row.refused
    assert built(adam) is FusedAdam


def test_an_adam_that_is_one_percent_off_is_left_out(built, runtime, install):
    install(APEX, FusedAdam=WrongAdam)
    adam, row = chosen_adam(runtime)
    assert row.name == "torch AdamW, fused"
    assert "Apex FusedAdam differs from torch's by" in row.why and "left out" in row.why and row.refused
    assert built(adam) is torch.optim.AdamW


def test_a_wrong_one_does_not_hide_a_right_one(built, runtime, install):
    install(TE, FusedAdam=WrongAdam)
    install(APEX, FusedAdam=FusedAdam)
    adam, row = chosen_adam(runtime)
    assert row.name == "Apex FusedAdam" and "TransformerEngine FusedAdam differs from torch's" in row.why
    assert built(adam) is FusedAdam


def test_an_adam_that_fails_its_trial_is_left_out(built, runtime, install):
    install(TE, FusedAdam=BrokenAdam)
    adam, row = chosen_adam(runtime)
    assert "TransformerEngine FusedAdam failed its trial (RuntimeError: no kernel image is" in row.why
    assert built(adam) is torch.optim.AdamW


BROKEN = {
    'raise RuntimeError("found no extension")': "RuntimeError: found no extension",  # a wheel without that for torch
    'raise ImportError("te.so: undefined symbol: _ZN3c10")': "ImportError: te.so: undefined symbol: _ZN3c10",
    'raise OSError("libcudart.so.99: cannot open")': "OSError: libcudart.so.99: cannot open",
    "import os; os.absent": "AttributeError: module 'os' has no attribute 'absent'",
    "import onnxscript_absent": "ModuleNotFoundError: No module named 'onnxscript_absent'",  # which it needs itself
    "": "ModuleNotFoundError: No module named 'transformer_engine.pytorch'",  # of another version
}


@pytest.mark.parametrize(("text", "error"), BROKEN.items(), ids=BROKEN.values())
def test_a_package_that_breaks_on_import_is_named(runtime, tmp_path, monkeypatch, text, error):
    """It is not said not to be installed."""
    without("transformer_engine")
    package = tmp_path / "transformer_engine"
    package.mkdir()
    Path(package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    adam, row = chosen_adam(runtime)
    sys.modules.pop("transformer_engine", None)
    assert row.why == f"TransformerEngine FusedAdam does not import ({error})" and row.refused
    assert adam is torch.optim.AdamW
    asked = RunContext(Config(precision="fp8", fp8=Fp8Config(kernels="te")), runtime, torch.float32)
    needs = f"fp8.kernels=te: needs the package transformer-engine, which does not import ({error})"
    with pytest.raises(ValueError, match=f"{re.escape(needs)}. Our own kernels: fp8.kernels=auto"):
        select([TE_FP8], asked)
    sys.modules.pop("transformer_engine", None)


def test_adamw_in_blocks_needs_no_other(runtime, install):
    install(APEX, FusedAdam=FusedAdam)
    context = run_context(tiny(), runtime, optim=OptimConfig(cpu_offload=True))
    assert select([ADAMW], context) == ({}, [])
    assert select([ADAMW], replace(run_context(tiny(), runtime), train=False)) == ({}, [])


def test_training_and_resuming_with_a_fused_adam(runtime, install, tmp_path):
    torchs = build_engine(runtime, Variant())
    wanted = train(torchs, range(4))
    install(APEX, FusedAdam=FusedAdam)
    adam, _ = chosen_adam(runtime)
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


@pytest.fixture
def norm_of(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Norm, Row]]:
    """The RMSNorm of a run that has Apex's alone beside torch's."""
    monkeypatch.setattr(registry, "CPP_KERNELS", {})
    monkeypatch.setattr(RMS_NORM, "implementations", [i for i in RMS_NORM.implementations if i.name == "Apex"])

    def norm_of(dtype: torch.dtype = torch.float32, **model: Any) -> tuple[Norm, Row]:
        return selected(RMS_NORM, run_context(tiny(hidden_size=32, **model), runtime, dtype, CPU))

    return norm_of


def test_a_norm_that_computes_the_same_is_used(install, norm_of):
    install(NORM, fused_rms_norm_affine=apex_norm())
    norm, row = norm_of()
    assert row.name == "Apex"
    x, weight = torch.randn(3, 32), torch.rand(32)
    torch.testing.assert_close(norm(x, weight, 1e-3), torch_rms_norm(x, weight, 1e-3))


@pytest.mark.parametrize("scales", [(1.01, 1.0), (1.0, 1.01), (float("nan"), 1.0)], ids=["output", "gradient", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_off_is_left_out(install, norm_of, scales, dtype):
    if dtype == torch.bfloat16:
        scales = tuple(1 + 3 * (s - 1) for s in scales)  # bf16 itself rounds by up to 0.4 %
    install(NORM, fused_rms_norm_affine=apex_norm(*scales))
    norm, row = norm_of(dtype)
    assert norm is torch_rms_norm and "Apex differs from torch's" in row.why and row.refused


@pytest.mark.parametrize(("qk_norm", "width"), [("head", 6), ("full", 12), ("full", 6)])
def test_a_norm_is_tried_at_every_width_that_it_is_for(install, norm_of, qk_norm, width):
    """Of the hidden size and, with qk_norm, of heads or of all queries and all keys."""
    right, off = apex_norm(), apex_norm(1.01)
    install(NORM, fused_rms_norm_affine=lambda x, *how: (off if x.shape[-1] == width else right)(x, *how))
    heads = {"num_attention_heads": 2, "num_query_groups": 1, "head_dim": 6}
    assert norm_of(**heads)[1].name == "Apex"
    norm, row = norm_of(**heads, qk_norm=qk_norm)
    assert norm is torch_rms_norm and "Apex differs from torch's" in row.why


def test_torchs_norm_is_the_formula():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    for row, got in zip(x, torch_rms_norm(x, weight, 0.1), strict=True):
        mean_square = sum(v * v for v in row.tolist()) / 8
        wanted = [v / (mean_square + 0.1) ** 0.5 * w for v, w in zip(row.tolist(), weight.tolist(), strict=True)]
        assert got.tolist() == pytest.approx(wanted, rel=1e-12)


def fast_on_rank_0(world: World) -> tuple[float, Row, float]:
    """Of two operations, one has an implementation on the first rank alone (rank function)."""

    def operation(name: str, everywhere: bool) -> Operation[float]:
        def load(context: RunContext) -> float:
            if not everywhere and context.runtime.world.rank:
                raise ImportError(name)
            return 2.0

        plain = Implementation("torch, in blocks", lambda context: 1.0)
        fast = Implementation("native", load, "fast")
        return Operation(name, name, lambda context: plain, [fast], lambda *_: [], {torch.float32: 0.0})

    with started(world, ParallelConfig()) as runtime:
        chosen, rows = select([operation("loss", False), operation("norm", True)], run_context(tiny(), runtime))
        return chosen["loss"], rows[0], chosen["norm"]


def test_ranks_that_differ_take_torch(ranks: RankPool) -> None:
    """Else one would wait for messages that another never sends."""
    row = Row("loss", "torch, in blocks", "nodes differ in what they have: native, torch, in blocks", True)
    assert ranks.run(2, fast_on_rank_0, timeout=120) == [(1.0, row, 2.0)] * 2
