"""Which layers precision=fp8 takes, with which kernels, and what it says when it cannot."""

import sys

import pytest
import torch

from conf.schema import Fp8Config, ModelConfig, MoeConfig
from moe import experts
from moe.experts import choose_backend
from ops.fp8 import choose_float8, disagreement, routed_experts
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference, Tools
from ops.grouped_mlp import experts_with
from tests.moe.helpers import tiny, whole_model
from training.builder import choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = ModelConfig(num_layers=6)


def test_a_cpu_emulates_and_says_so() -> None:
    chosen, name, why = choose_float8(Fp8Config(weight_gradient="fp8", recipe="rowwise"), MODEL, CPU)
    assert chosen.experts is chosen.linear and list(chosen.layers) == [*range(6)]
    assert isinstance(chosen.linear, Reference) and chosen.linear.narrow_weight_gradient
    assert chosen.linear.recipe == RECIPES["rowwise"]
    assert name == "emulated by rounding operands, rowwise" and why == "every layer; a CPU has no FP8 products"


def test_first_and_last_layers_stay_high() -> None:
    chosen, name, why = choose_float8(Fp8Config(first_layers_high=1, last_layers_high=2), MODEL, CPU)
    assert list(chosen.layers) == [1, 2, 3] and why.startswith("layers 1 to 3; ")
    assert name.endswith("blockwise, weight gradients in bf16")


def test_the_experts_alone() -> None:
    chosen, _, why = choose_float8(Fp8Config(linear_layers=False), MODEL, CPU)
    assert chosen.linear is None and why.startswith("the experts of every layer; ")


@pytest.mark.parametrize("linear_layers", [True, False])
def test_only_the_layers_named_compute_in_fp8(runtime, linear_layers: bool) -> None:
    """Attention, if it is to, and experts of layer 1, each with their own tools; router, norms and head of none."""
    from ops.fp8 import Float8
    from tests.moe import helpers

    used: list[tuple[Reference, int]] = []

    class Recording(Reference):
        def weight(self, w_LKN):
            used.append((self, w_LKN.numel()))
            return super().weight(w_LKN)

    model = tiny(MoeConfig(num_experts=4), num_layers=3)
    parts = helpers.parts_of(model, runtime)
    float8 = Float8(Recording(), Recording() if linear_layers else None, range(1, 2))
    stage = type(whole_model(model, runtime))(
        type(parts)(parts.model, parts.config, runtime, parts.backend, 1, float8=float8),
        chunk=0,
        sequence_length=16,
        document_mask=False,
    )
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    stage(tokens, torch.arange(4)[None], tokens)
    layer = stage.layers["1"]
    linear = [layer.attention.qkv.weight, layer.attention.out.weight]
    expected = [(float8.linear, w) for w in linear if linear_layers]
    expected += [(float8.experts, w) for w in (layer.ffn.experts.w_in, layer.ffn.experts.w_out)]
    assert used == [(tools, w.numel()) for tools, w in expected]


class Wrong(Reference):
    """A set of tools whose gradients are off."""

    def product(self, x_RK, w_LKN, groups, dtype):
        return super().product(x_RK, w_LKN, groups, dtype) * (1.0 if w_LKN.shape[2] > 256 else 1.05)


class Broken(Reference):
    def columns(self, x_RK, groups, row_R=None):
        raise RuntimeError("no kernel image is available")


def test_kernels_are_taken_only_when_they_equal_the_reference(device: torch.device) -> None:
    from ops.triton.gemm_backend import Float8Tools, TritonTools

    recipe = RECIPES["blockwise"]

    def told(tools: Tools, reference: Reference) -> str | None:
        return disagreement(experts_with(tools), experts_with(reference), device, run=routed_experts)

    assert told(TritonTools(), Reference()) is None
    assert told(Float8Tools(recipe), Reference(recipe)) is None
    assert told(Wrong(), Reference()).startswith("differ from the reference by ")
    assert told(Broken(), Reference()) == "failed their trial (RuntimeError: no kernel image is available)"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of this compute capability, as far as the choice looks at it."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


def test_an_older_gpu_is_told_what_it_lacks(gpu) -> None:
    gpu((8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9; this one has 8\.0\. Use .*precision=bf16"):
        choose_float8(Fp8Config(), MODEL, CUDA)


def test_kernels_that_were_asked_for_need_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"precision=fp8 needs a GPU, .*fp8\.kernels=reference"):
        choose_float8(Fp8Config(kernels="triton"), MODEL, CPU)
    model = tiny(MoeConfig(num_experts=4, backend="triton"))
    with pytest.raises(ValueError, match=r"model\.moe\.backend=triton needs a GPU, .*model\.moe\.backend=auto"):
        choose_backend(model, CPU, torch.bfloat16)


def test_a_missing_package_is_named(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"package triton, .*launch/setup\.sh kernels"):
        choose_float8(Fp8Config(), MODEL, CUDA)


def test_triton_experts_are_for_bf16(gpu, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(experts, "_triton_disagrees", lambda _: None)  # the trial would run on the GPU
    model = tiny(MoeConfig(num_experts=4, backend="triton"))
    assert choose_backend(model, CUDA, torch.bfloat16)[0] == "triton"
    with pytest.raises(ValueError, match=r"backend=triton .*bf16"):
        choose_backend(model, CUDA, torch.float32)


def test_precision_needs_bf16_arithmetic_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(ValueError, match="precision=fp8: the GPU has no bf16 arithmetic"):
        choose_precision("fp8", CUDA)
    assert choose_precision("fp8", CPU)[0] == "fp8"
