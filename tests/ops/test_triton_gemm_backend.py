"""Every kernel against plain torch: ragged and empty groups, strided operands, outputs that held not-a-number."""

import pytest
import torch
from torch import Tensor

from conf.model_schema import GATED_ACTIVATIONS
from ops.activations import IN_KERNELS, activate
from ops.fp8_numerics import BLOCK, RECIPES, quantise
from ops.gemm_backend import Reference
from ops.grouped_mlp import experts_with
from parallel.process_groups import Runtime
from tests.moe.helpers import random
from tests.ops.test_grouped_mlp import COUNTS, inputs, read_in_place, relative, results
from tests.parallel.helpers import Variant, build_engine, train

GROUPS = [[3, 0, 130, 1], [0, 0, 0, 5], [128, 0, 256, 0], [0, 0, 0, 0]]
KINDS = ["bf16", "grouped_mm", *RECIPES]
pytestmark = pytest.mark.usefixtures("poisoned")


def tools_of(kind: str) -> tuple[object, Reference]:
    """(ours in Triton, the reference) in bf16 or for a recipe, weight gradients included."""
    from ops.triton.gemm_backend import Float8GemmBackend, GroupedMmBackend, TritonGemmBackend

    if kind in ("bf16", "grouped_mm"):
        return TritonGemmBackend() if kind == "bf16" else GroupedMmBackend(), Reference()
    recipe = RECIPES[kind]
    return Float8GemmBackend(recipe, narrow_weight_gradient=True), Reference(recipe, narrow_weight_gradient=True)


def strided(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Random bf16 of which neighbours in memory are not neighbours in the tensor: part of something larger."""
    return random(*shape[:-1], shape[-1] + 24, seed=seed).bfloat16().to(device)[..., 8:-16]


def assert_near(got: Tensor, wanted: Tensor, bar: float = 2e-3) -> None:
    """Relative error by norm; shapes agree, and what is not written is not a number and does not pass."""
    assert got.shape == wanted.shape
    assert not got.numel() or relative(got.float().cpu(), wanted.float().cpu()) <= bar


@pytest.mark.parametrize("counts", GROUPS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_reference(kind: str, counts: list[int], device: torch.device) -> None:
    """Forward, input gradient and weight gradient; no size a multiple of a tile, but one of 16 bytes."""
    mine, reference = tools_of(kind)
    x_RK, dy_RN = (strided(sum(counts), n, seed=n, device=device) for n in (208, 144))
    w_LKN = strided(4, 208, 144, seed=3, device=device)
    groups, weight, wanted = mine.groups(counts, device), mine.weight(w_LKN), reference.weight(w_LKN)
    theirs = reference.groups(counts, device)
    y_RN = mine.product(mine.rows(x_RK), weight.forward, groups, torch.bfloat16)
    assert_near(y_RN, reference.product(reference.rows(x_RK), wanted.forward, theirs, torch.bfloat16))
    dx_RK = mine.product(mine.rows(dy_RN), weight.back, groups, torch.bfloat16)
    assert_near(dx_RK, reference.product(reference.rows(dy_RN), wanted.back, theirs, torch.bfloat16))
    dw_LKN = mine.weight_gradient(mine.columns(x_RK, groups), mine.columns(dy_RN, groups), groups, w_LKN)
    columns = reference.columns(x_RK, theirs), reference.columns(dy_RN, theirs)
    wanted_LKN = reference.weight_gradient(*columns, theirs, w_LKN)
    assert_near(dw_LKN, wanted_LKN)
    assert not dw_LKN[[e for e, n in enumerate(counts) if not n]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_from_where_they_lie(kind: str, device: torch.device) -> None:
    """Product and weight gradient of 7 tokens whose rows several experts share, strided."""
    mine, reference = tools_of(kind)
    counts, row_R = [3, 0, 130, 1], torch.arange(134, device=device) * 5 % 7
    x_TK, dy_RN = (strided(rows, n, seed=n, device=device) for rows, n in ((7, 208), (134, 144)))
    w_LKN = strided(4, 208, 144, seed=3, device=device)
    told = []
    for gemm, gathered in ((mine, False), (reference, True)):
        x, row = (x_TK[row_R], None) if gathered else (x_TK, row_R)
        groups = gemm.groups(counts, device)
        y_RN = gemm.product(gemm.rows(x, row), gemm.weight(w_LKN).forward, groups, torch.bfloat16)
        operands = gemm.columns(x, groups, row), gemm.columns(dy_RN, groups)
        told.append([y_RN, gemm.weight_gradient(*operands, groups, w_LKN)])
    for got, wanted in zip(*told, strict=True):
        assert_near(got, wanted)


@pytest.mark.parametrize("kind", ["bf16", "blockwise"])
def test_weight_gradients_add_to_the_main_gradient(kind: str, device: torch.device) -> None:
    """In fp32, over micro-batches, as Megatron-Core's hook expects; an expert without rows keeps what it has."""
    mine, _ = tools_of(kind)
    x_RK, dy_RN = (random(sum(COUNTS), n, seed=n).bfloat16().to(device) for n in (64, 144))
    w = torch.nn.Parameter(torch.zeros(4, 64, 144, dtype=torch.bfloat16, device=device))
    groups = mine.groups(COUNTS, device)
    operands = mine.columns(x_RK, groups), mine.columns(dy_RN, groups)
    once = mine.weight_gradient(*operands, groups, w)
    w.main_grad, w.grad_added_to_main_grad = torch.full(w.shape, 0.125, device=device), False
    for _ in range(2):
        assert mine.weight_gradient(*operands, groups, w).shape == w.shape
    assert w.grad_added_to_main_grad
    assert_near(w.main_grad - 0.125, 2 * once, bar=4e-3)  # `once` was rounded to bf16
    assert (w.main_grad[1] == 0.125).all()


@pytest.mark.parametrize("kind", ["bf16", "blockwise"])
def test_a_bf16_main_gradient_is_left_to_megatron_core(kind: str, device: torch.device) -> None:
    """optim.grad_dtype=bf16: the gradient is returned, and the hook of the gradient buckets adds it."""
    mine, _ = tools_of(kind)
    x_RK, dy_RN = (random(sum(COUNTS), n, seed=n).bfloat16().to(device) for n in (64, 144))
    w = torch.nn.Parameter(torch.zeros(4, 64, 144, dtype=torch.bfloat16, device=device))
    groups = mine.groups(COUNTS, device)
    operands = mine.columns(x_RK, groups), mine.columns(dy_RN, groups)
    wanted = mine.weight_gradient(*operands, groups, w)
    w.main_grad, w.grad_added_to_main_grad = torch.full_like(w, 0.125), False
    assert torch.equal(mine.weight_gradient(*operands, groups, w), wanted)
    assert not w.grad_added_to_main_grad and (w.main_grad == 0.125).all()


@pytest.mark.parametrize("kind", KINDS)
def test_some_experts_of_a_weight_are_their_weight(kind: str, device: torch.device) -> None:
    mine, _ = tools_of(kind)
    w_LKN, some = random(5, 160, 136).bfloat16().to(device), slice(1, 3)
    part, alone = mine.weight(w_LKN)[some], mine.weight(w_LKN[some])
    for got, wanted in ((part.forward, alone.forward), (part.back, alone.back)):
        assert torch.equal(got.values.float(), wanted.values.float()) and got.blocks == wanted.blocks
        assert (got.scale is None) == (kind not in RECIPES) and (
            got.scale is None or torch.equal(got.scale, wanted.scale)
        )


def extremes(device: torch.device) -> Tensor:
    """[40, 300] of magnitudes from 1e-30 to 1e30, with zeros."""
    x = random(40, 300) * 10.0 ** torch.linspace(-30, 30, 40)[:, None].roll(7, 0)
    x[3], x[:, 5] = 0, 0
    return x.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_gives_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    mine, _ = tools_of("blockwise")
    x_RK = extremes(device).to(dtype)
    rows = mine.rows(x_RK)
    assert_same_bits(rows.values, rows.scale, quantise(x_RK, (1, BLOCK)))
    w_LKN = x_RK.unflatten(1, (2, 150)).transpose(0, 1)  # [2, 40, 150]
    weight, wanted = mine.weight(w_LKN), quantise(w_LKN, (BLOCK, BLOCK))
    assert_same_bits(weight.forward.values, weight.forward.scale, wanted)
    assert_same_bits(weight.back.values, weight.back.scale, wanted.transpose())
    assert weight.forward.values.stride(1) == weight.back.values.stride(1) == 1
    counts = [0, 7, 33]
    q, scale = mine.columns(x_RK, mine.groups(counts, device))
    for tile, x in enumerate((x_RK[:7], x_RK[7:])):
        part = q[:, BLOCK * tile : BLOCK * (tile + 1)].t()
        assert_same_bits(part[: len(x)], scale[tile : tile + 1], quantise(x, (BLOCK, 1)))
        assert not part[len(x) :].float().any()  # padding is zero, whatever was there


def assert_same_bits(values: Tensor, scale: Tensor, wanted) -> None:
    assert torch.equal(values.float(), wanted.values.float()) and torch.equal(scale, wanted.scale)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_number_stays_one(broken: float, device: torch.device) -> None:
    mine, _ = tools_of("blockwise")
    x_RK = random(4, 256).to(device)
    x_RK[2, 130] = broken
    rows = mine.rows(x_RK)
    finite = (rows.values.float() * rows.scale.repeat_interleave(BLOCK, 1)).isfinite()
    assert not finite[2, 130] and finite[[0, 1, 3]].all() and finite[2, :BLOCK].all()


@pytest.mark.parametrize("name", IN_KERNELS)
@pytest.mark.parametrize("width", [128, 200])
def test_activations_in_one_pass(name: str, width: int, device: torch.device) -> None:
    """Against autograd in fp32; what is rounded to FP8 is the rounded bf16 result, in blocks of 128 that do not reach
    from gate to up when the width allows it."""
    mine, _ = tools_of("blockwise")
    plain, _ = tools_of("bf16")
    h_RGF = random(19, 2 if name in GATED_ACTIVATIONS else 1, width).bfloat16().to(device)
    da_RF = strided(19, width, seed=2, device=device)
    leaf = h_RGF.float().requires_grad_()
    a_RF = activate(leaf.unbind(1), name)
    dh_RN = torch.autograd.grad(a_RF, leaf, da_RF.float())[0].flatten(1)
    assert_near(plain.activate(h_RGF, name).values, a_RF.detach())
    for gemm in (plain, mine):
        got_a, got_dh, rows = gemm.activate_back(h_RGF, da_RF, name)
        assert_near(got_a, a_RF.detach())
        assert_near(got_dh, dh_RN)
    assert_same_bits(rows.values, rows.scale, quantise(got_dh, (1, BLOCK)))
    narrow = mine.activate(h_RGF, name)
    assert_same_bits(narrow.values, narrow.scale, quantise(got_a, (1, BLOCK)))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_triton_are_the_experts_of_the_reference(kind: str, device: torch.device) -> None:
    tensors = [inputs("swiglu", torch.bfloat16) for _ in range(2)]
    mine = [t.detach().to(device).requires_grad_() for t in tensors[0]]
    gemm, reference = tools_of(kind)
    got = results(experts_with(gemm), "swiglu", mine)
    for a, b in zip(got, results(experts_with(reference), "swiglu", tensors[1]), strict=True):
        assert_near(a, b)


def test_experts_in_triton_read_rows_where_they_lie(device: torch.device) -> None:
    gemm, reference = tools_of("blockwise")
    got = read_in_place(gemm, [t.to(device) for t in inputs("swiglu", torch.bfloat16)], gathered=False)
    wanted = read_in_place(reference, inputs("swiglu", torch.bfloat16), gathered=True)
    for a, b in zip(got, wanted, strict=True):
        assert_near(a, b, bar=4e-3)  # a token's gradient is added up in bf16 by the reference


def test_a_model_trains_on_these_kernels(runtime: Runtime, device: torch.device) -> None:
    """Every FP8 product of a step, in experts, attention and a dense layer: losses and gradient norms."""
    sizes = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 128, "num_query_groups": 4}
    told = []
    for gemm in tools_of("blockwise"):
        variant = Variant(sizes, {"every": 2, "num_experts": 2}, dtype=torch.bfloat16, gemm=gemm)
        told.append(train(build_engine(runtime, variant), range(1)))
    torch.testing.assert_close(torch.tensor(told[0]), torch.tensor(told[1]), rtol=5e-3, atol=0)
