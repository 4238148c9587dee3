"""Which layers precision=fp8 takes, with which kernels, and what it says when it cannot."""

import sys
from dataclasses import replace

import pytest
import torch

from conf.schema import Fp8Config, ModelConfig, MoeConfig
from models.decoder import ModelChunk
from ops.experts import EXPERTS, ExpertBackend
from ops.fp8 import FLOAT8, Float8
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference
from ops.operation import Row
from ops.registry import examine
from parallel.process_groups import Runtime
from tests.moe.helpers import build_context, run_context, selected, tiny, try_on
from training.builder import choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = ModelConfig(num_layers=6, hidden_size=128, ffn_hidden_size=128, moe=MoeConfig(num_experts=4))


def chosen(
    runtime: Runtime, fp8: Fp8Config, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16
) -> tuple[Float8, str, str]:
    """What precision=fp8 takes, its name and why."""
    float8, row = selected(FLOAT8, run_context(MODEL, runtime, dtype, device, fp8=fp8, precision="fp8"))
    assert row.operation == "FP8 products"
    return float8, row.name, row.why


def test_a_cpu_emulates_and_says_so(runtime: Runtime) -> None:
    float8, name, why = chosen(runtime, Fp8Config(weight_gradient="fp8", recipe="rowwise"))
    assert list(float8.layers) == [*range(6)] and float8.experts.run.args == (float8.linear,)
    assert isinstance(float8.linear, Reference) and float8.linear.narrow_weight_gradient
    assert float8.linear.recipe == RECIPES["rowwise"]
    assert name == "emulated by rounding operands, rowwise" and why == "every layer; a CPU has no FP8 products"
    assert chosen(runtime, Fp8Config(kernels="reference"))[2] == "every layer; asked for"


def test_first_and_last_layers_stay_high(runtime: Runtime) -> None:
    float8, name, why = chosen(runtime, Fp8Config(first_layers_high=1, last_layers_high=2))
    assert list(float8.layers) == [1, 2, 3] and why.startswith("layers 1 to 3; ")
    assert name.endswith("blockwise, weight gradients in bf16")


def test_an_activation_that_the_kernels_do_not_have_is_refused(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension's: nothing computes it in FP8 on a GPU."""
    monkeypatch.setattr("ops.fp8.triton_unsupported_reason", lambda *_: None)
    context = run_context(replace(MODEL, activation="mish"), runtime, torch.bfloat16, CUDA, precision="fp8")
    with pytest.raises(ValueError, match=r"has no activation mish\. Use precision=bf16, or fp8\.kernels"):
        examine(FLOAT8, context)


def test_the_experts_alone(runtime: Runtime) -> None:
    float8, _, why = chosen(runtime, Fp8Config(linear_layers=False))
    assert float8.linear is None and why.startswith("the experts of every layer; ")


@pytest.mark.parametrize("linear_layers", [True, False])
def test_only_the_layers_named_compute_in_fp8(runtime, linear_layers: bool) -> None:
    """Attention, if it is to, and experts of layer 1, each on their own backend; router, norms and head of none."""
    used: list[tuple[Reference, int]] = []

    class Recording(Reference):
        def weight(self, w_LKN):
            used.append((self, w_LKN.numel()))
            return super().weight(w_LKN)

    model = tiny(MoeConfig(num_experts=4), num_layers=3)
    experts, linear = Recording(), Recording() if linear_layers else None
    context = build_context(model, runtime, float8=Float8(ExpertBackend.on(experts), linear, range(1, 2)))
    stage = ModelChunk(context, chunk=0, sequence_length=16, document_mask=False)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    stage(tokens, torch.arange(4)[None], tokens)
    layer = stage.layers["1"]
    weights = [layer.attention.qkv.weight, layer.attention.out.weight]
    expected = [(linear, w) for w in weights if linear_layers]
    expected += [(experts, w) for w in (layer.ffn.experts.w_in, layer.ffn.experts.w_out)]
    assert used == [(gemm, w.numel()) for gemm, w in expected]


class Wrong(Reference):
    """A GEMM backend whose gradients are off."""

    def product(self, x_RK, w_LKN, groups, dtype):
        return super().product(x_RK, w_LKN, groups, dtype) * 1.05


class Broken(Reference):
    def columns(self, x_RK, groups, row_R=None):
        raise RuntimeError("no kernel image is available")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of this compute capability, as far as the choice looks at it."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


def test_kernels_are_taken_only_when_they_equal_the_reference(
    runtime: Runtime, gpu, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ops.triton import gemm_backend

    try_on(device, FLOAT8, monkeypatch)
    gpu((9, 0))
    only_experts = Fp8Config(linear_layers=False)
    assert chosen(runtime, only_experts, CUDA)[1] == "Triton, blockwise, weight gradients in bf16"
    for kind, told in (
        (Wrong, r"differs from the reference by \d"),
        (Broken, r"failed its trial \(RuntimeError: no kernel image is available\)"),
    ):
        monkeypatch.setattr(gemm_backend, "Float8GemmBackend", kind)
        with pytest.raises(ValueError, match=rf"precision=fp8 {told}.* Use precision=bf16, or fp8\.kernels=reference"):
            chosen(runtime, only_experts, CUDA)


def test_an_older_gpu_is_told_what_it_lacks(runtime: Runtime, gpu) -> None:
    gpu((8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9; this one has 8\.0\. Use .*precision=bf16"):
        chosen(runtime, Fp8Config(), CUDA)


def experts_row(runtime: Runtime, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Row:
    model = tiny(MoeConfig(num_experts=4, backend="triton"))
    return selected(EXPERTS, run_context(model, runtime, dtype, device))[1]


def test_kernels_that_were_asked_for_need_a_gpu(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"precision=fp8 needs a GPU, .*fp8\.kernels=reference"):
        chosen(runtime, Fp8Config(kernels="triton"))
    with pytest.raises(ValueError, match=r"model\.moe\.backend=triton needs a GPU, .*model\.moe\.backend=auto"):
        experts_row(runtime, CPU)


def test_a_missing_package_is_named(runtime: Runtime, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"package triton, .*launch/setup\.sh kernels"):
        chosen(runtime, Fp8Config(), CUDA)


def test_triton_experts_are_for_bf16(
    runtime: Runtime, gpu, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ops.triton import gemm_backend

    gpu((9, 0))
    try_on(device, EXPERTS, monkeypatch)
    assert experts_row(runtime, CUDA).name == "triton"
    with pytest.raises(ValueError, match=r"backend=triton .*bf16"):
        experts_row(runtime, CUDA, torch.float32)
    monkeypatch.setattr(gemm_backend, "TritonGemmBackend", Wrong)
    with pytest.raises(ValueError, match=r"backend=triton differs from the reference by "):
        experts_row(runtime, CUDA)


def test_precision_needs_bf16_arithmetic_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(ValueError, match="precision=fp8: the GPU has no bf16 arithmetic"):
        choose_precision("fp8", CUDA)
    assert choose_precision("fp8", CPU)[0] == "fp8"
