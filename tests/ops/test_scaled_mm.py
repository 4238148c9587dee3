"""FP8 linear layers on torch's scaled matrix product: the real one where this machine has it, else a stand-in that
refuses what a GPU would."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import Fp8Config, ModelConfig
from ops import fp8
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference
from ops.grouped_mlp import linear_with
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_context, selected, try_on
from tests.ops.scaled_mm import OnGPU
from tests.ops.test_triton_gemm_backend import assert_near, strided

pytestmark = pytest.mark.usefixtures("poisoned")
ON_CPU = ("rowwise", "tensorwise")
"""What torch 2.13's scaled_mm multiplies on a CPU."""
SHAPES = [(150, 384, 256), (1, 128, 512), (256, 640, 128)]
"""(R, K, N); blocks along K and N that are no multiple of four, and rows that are none."""


@pytest.fixture
def gpu_product(monkeypatch: pytest.MonkeyPatch) -> OnGPU:
    stand_in = OnGPU()
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", stand_in)
    return stand_in


def linear(gemm: Any, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x [R, K] and w [N, K]."""
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = linear_with(gemm)(x, w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]


def assert_equal_to_the_reference(recipe: str, narrow: bool, size: tuple[int, ...], on: torch.device) -> None:
    from ops.triton.scaled_mm import ScaledMmBackend

    rows, inner, outer = size
    x_RK, dy_RN = (strided(rows, n, seed=n, device=on) for n in (inner, outer))
    w_NK = random(outer, inner, seed=3).bfloat16().to(on)
    kinds = (ScaledMmBackend, Reference)
    got, wanted = (linear(kind(RECIPES[recipe], narrow_weight_gradient=narrow), x_RK, w_NK, dy_RN) for kind in kinds)
    for mine, reference in zip(got, wanted, strict=True):
        assert_near(mine, reference)


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("recipe", ON_CPU)
def test_torch_multiplies_what_the_reference_multiplies(
    recipe: str, narrow: bool, size: tuple[int, ...], device: torch.device
) -> None:
    try:
        assert_equal_to_the_reference(recipe, narrow, size, device)
    except NotImplementedError:  # torch 2.11 has the function, but none of its kernels for a CPU
        pytest.skip(f"torch {torch.__version__} has no scaled_mm on {device.type}")


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_gets_its_operands_as_it_demands_them(
    recipe: str, narrow: bool, size: tuple[int, ...], device: torch.device, gpu_product: OnGPU
) -> None:
    assert_equal_to_the_reference(recipe, narrow, size, device)
    assert gpu_product.calls == (3 if narrow else 2)


def test_no_rows_are_no_rows(device: torch.device, gpu_product: OnGPU) -> None:
    from ops.triton.scaled_mm import ScaledMmBackend

    gemm, w_LKN = ScaledMmBackend(RECIPES["blockwise"]), random(1, 256, 128).bfloat16().to(device)
    none = gemm.rows(w_LKN[0, :0, :].new_zeros(0, 256))
    y_RN = gemm.product(none, gemm.weight(w_LKN).forward, gemm.groups([0], device), torch.bfloat16)
    assert y_RN.shape == (0, 128)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_gradients_add_to_the_main_gradient(recipe: str, device: torch.device, gpu_product: OnGPU) -> None:
    """In fp32, over micro-batches: what was rounded to bf16 in between would be off by more than the bar."""
    from ops.triton.scaled_mm import ScaledMmBackend

    x_RK, dy_RN = (random(150, n, seed=n).bfloat16().to(device) for n in (256, 128))
    w_NK = random(128, 256).bfloat16().to(device).requires_grad_()
    gemm, reference = (kind(RECIPES[recipe], narrow_weight_gradient=True) for kind in (ScaledMmBackend, Reference))
    once = linear(reference, x_RK.float(), w_NK.float(), dy_RN.float())[2]
    w_NK.main_grad, w_NK.grad_added_to_main_grad = torch.full(w_NK.shape, 0.125, device=device), False
    for _ in range(2):
        y_RN = linear_with(gemm)(x_RK, w_NK)
        assert torch.autograd.grad(y_RN, w_NK, dy_RN)[0].shape == w_NK.shape
    assert w_NK.grad_added_to_main_grad
    assert_near(w_NK.main_grad - 0.125, 2 * once, bar=1e-5)


@pytest.fixture
def choose(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, device: torch.device):
    """What precision=fp8 takes on a GPU with this scaled_mm, as far as the choice looks at it: trials run where the
    tests do."""

    def choose(stand_in: OnGPU, **settings: str) -> tuple[fp8.Float8, str, str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: stand_in.capability)
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", stand_in)
        try_on(device, fp8.FLOAT8, monkeypatch)
        model, here = ModelConfig(num_layers=2, hidden_size=128), Fp8Config(**settings)
        context = run_context(model, runtime, torch.bfloat16, torch.device("cuda"), fp8=here, precision="fp8")
        float8, row = selected(fp8.FLOAT8, context)
        return float8, row.name, row.why

    return choose


@pytest.mark.parametrize(
    "capability, recipe", [((9, 0), "blockwise"), ((9, 0), "rowwise"), ((10, 0), "rowwise"), ((8, 9), "tensorwise")]
)
def test_linear_layers_are_torchs_where_it_equals_the_reference(choose, capability: Any, recipe: str) -> None:
    from ops.triton.gemm_backend import Float8GemmBackend
    from ops.triton.scaled_mm import ScaledMmBackend

    chosen, name, why = choose(OnGPU(capability), recipe=recipe, weight_gradient="fp8")
    assert type(chosen.experts.run.args[0]) is Float8GemmBackend and type(chosen.linear) is ScaledMmBackend
    assert chosen.linear.recipe == RECIPES[recipe] and chosen.linear.narrow_weight_gradient
    assert name == f"experts on Triton, linear layers on torch's scaled_mm, {recipe}"
    assert why == "every layer; the GPU has FP8 products, and they equal the reference's on a random batch"


@pytest.mark.parametrize(
    "stand_in, told",
    [
        (functools.partial(OnGPU, (10, 0)), "failed its trial (NotImplementedError: DeepSeek style"),
        (functools.partial(OnGPU, factor=1.03), "differs from the reference by 3e-02"),
    ],
    ids=["not served", "wrong"],
)
def test_elsewhere_they_are_tritons_and_the_table_says_why(choose, stand_in: Any, told: str) -> None:
    chosen, name, why = choose(stand_in())
    assert chosen.experts.run.args == (chosen.linear,)
    assert name.startswith("experts and linear layers on Triton, blockwise") and f"torch's scaled_mm {told}" in why


def test_triton_can_be_asked_for(choose) -> None:
    stand_in = OnGPU()
    chosen, name, why = choose(stand_in, kernels="triton")
    assert chosen.experts.run.args == (chosen.linear,) and name.startswith("Triton, ") and "asked for" in why
    assert not stand_in.calls
