"""The experts' products for a CPU with AVX512-BF16: against plain torch in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.model_schema import GATED_ACTIVATIONS
from ops.activations import IN_KERNELS
from ops.cpp.experts import NativeGemmBackend
from ops.experts import loop_experts
from ops.gemm_backend import Reference
from ops.grouped_mlp import experts_with
from tests.moe.helpers import expert_backend, random
from tests.ops.test_grouped_mlp import COUNTS, inputs, kept, read_in_place, relative
from tests.ops.test_triton_gemm_backend import assert_near, strided

CPU = torch.device("cpu")
here = pytest.mark.usefixtures("cpp_kernels")
GEMM = NativeGemmBackend()
LARGE = [700, 0, 13, 1]
pytestmark = pytest.mark.usefixtures("poisoned")


def products(
    gemm: NativeGemmBackend, x_RK: Tensor, w_LKN: Tensor, dy_RN: Tensor, counts: list[int], row_R: Tensor | None = None
) -> list[Tensor]:
    """y, the gradient of the rows of x, and that of w."""
    groups, weight = gemm.groups(counts, CPU), gemm.weight(w_LKN)
    y_RN = gemm.product(gemm.rows(x_RK, row_R), weight.forward, groups, torch.bfloat16)
    dx_RK = gemm.product(gemm.rows(dy_RN), weight.back, groups, torch.bfloat16)
    operands = gemm.columns(x_RK, groups, row_R), gemm.columns(dy_RN, groups)
    return [y_RN, dx_RK, gemm.weight_gradient(*operands, groups, w_LKN)]


def in_float64(x_RK: Tensor, w_LKN: Tensor, dy_RN: Tensor, counts: list[int]) -> list[Tensor]:
    xs, ws, dys = x_RK.double().split(counts), w_LKN.double(), dy_RN.double().split(counts)
    out = [[x @ w, dy @ w.t(), x.t() @ dy] for x, w, dy in zip(xs, ws, dys, strict=True)]
    y, dx, dw = zip(*out, strict=True)
    return [torch.cat(y), torch.cat(dx), torch.stack(dw)]


@here
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 11, 12, 13, 24, 40]), min_size=1, max_size=4),
    inner=st.integers(1, 70),
    outer=st.integers(1, 100),
    contiguous=st.booleans(),
    gathered=st.booleans(),
)
def test_products_are_those_of_fp64(
    counts: list[int], inner: int, outer: int, contiguous: bool, gathered: bool
) -> None:
    """Around the edges of tiles: 12 rows, 32 columns, pairs of the inner dimension."""
    make = (
        (lambda *s, seed: random(*s, seed=seed).bfloat16())
        if contiguous
        else (lambda *s, seed: strided(*s, seed=seed, device=CPU))
    )
    rows = sum(counts)
    x_TK, w_LKN, dy_RN = (
        make(*s, seed=i) for i, s in enumerate(((rows + 3, inner), (len(counts), inner, outer), (rows, outer)))
    )
    row_R = torch.arange(rows) * 7 % (rows + 3) if gathered else None
    x_RK = x_TK[:rows] if row_R is None else x_TK[row_R]
    wanted = in_float64(x_RK, w_LKN, dy_RN, counts)
    for got, exact in zip(
        products(GEMM, x_RK if row_R is None else x_TK, w_LKN, dy_RN, counts, row_R), wanted, strict=True
    ):
        # What rounding to bf16 gives, value by value: half a unit of the last of 8 bits, and fp32 sums before it.
        assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@here
@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_threads_gives_the_same_bits(threads: int) -> None:
    """Parts of the work are cut by rows and by columns; sums are not."""
    x_RK, w_LKN, dy_RN = (random(*s, seed=i).bfloat16() for i, s in enumerate(((714, 300), (4, 300, 260), (714, 260))))
    wanted, before = products(GEMM, x_RK, w_LKN, dy_RN, LARGE), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = products(GEMM, x_RK, w_LKN, dy_RN, LARGE)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    for one, exact in zip(got, in_float64(x_RK, w_LKN, dy_RN, LARGE), strict=True):
        assert_near(one, exact)


@here
def test_more_columns_than_are_packed_at_once() -> None:
    """Of 17,001 rows 246 columns are 8 MiB."""
    x_RK, dy_RN, counts = random(17001, 320).bfloat16(), random(17001, 300, seed=1).bfloat16(), [17001]
    w_LKN = random(1, 320, 300, seed=2).bfloat16()
    for got, exact in zip(
        products(GEMM, x_RK, w_LKN, dy_RN, counts), in_float64(x_RK, w_LKN, dy_RN, counts), strict=True
    ):
        assert_near(got, exact)


@here
def test_a_row_is_the_same_wherever_it_lies() -> None:
    """Capacity, layout and micro-batch move rows about: the answer to a token must not depend on its neighbours."""
    x_RK, w_LKN = random(37, 70).bfloat16(), random(1, 70, 90, seed=1).bfloat16()
    whole, *alone = (
        GEMM.product(GEMM.rows(x), GEMM.weight(w_LKN).forward, GEMM.groups([len(x)], CPU), torch.bfloat16)
        for x in (x_RK, *x_RK.split(1))
    )
    assert torch.equal(whole, torch.cat(alone))


@here
def test_what_is_not_a_number_stays_with_its_row_and_expert() -> None:
    """Odd sizes, whose last pair has one value."""
    x_RK, w_LKN, dy_RN = (random(*s, seed=i).bfloat16() for i, s in enumerate(((30, 41), (3, 41, 51), (30, 51))))
    x_RK[11], dy_RN[11] = float("nan"), float("inf")
    y, dx, dw = products(GEMM, x_RK, w_LKN, dy_RN, [12, 5, 13])
    assert y[11].isnan().all() and not dx[11].isfinite().any() and not dw[0].isfinite().any()
    rest = [i for i in range(30) if i != 11]
    assert y[rest].isfinite().all() and dx[rest].isfinite().all() and dw[1:].isfinite().all()


@here
def test_weight_gradients_add_to_the_main_gradient() -> None:
    """In fp32, over micro-batches, as Megatron-Core's hook expects; an expert without rows keeps what it has."""
    x_RK, dy_RN = (random(sum(COUNTS), n, seed=n).bfloat16() for n in (64, 144))
    w = torch.nn.Parameter(torch.zeros(4, 64, 144, dtype=torch.bfloat16))
    w.main_grad, w.grad_added_to_main_grad = torch.full(w.shape, 0.125), False
    for _ in range(2):
        *_, dw = products(GEMM, x_RK, w.detach(), dy_RN, COUNTS)
        groups = GEMM.groups(COUNTS, CPU)
        assert GEMM.weight_gradient(GEMM.columns(x_RK, groups), GEMM.columns(dy_RN, groups), groups, w).shape == w.shape
    *_, exact = in_float64(x_RK, w.detach(), dy_RN, COUNTS)
    assert w.grad_added_to_main_grad and relative(dw.double(), exact) < 2e-3
    assert relative(w.main_grad.double() - 0.125, 2 * exact) < 1e-6
    assert (w.main_grad[1] == 0.125).all()


def gelu(x: Tensor) -> Tensor:
    """Exact for large negative x too, where 1 + erf(x) is a difference of equals."""
    return x * torch.special.erfc(-x / 2**0.5) / 2


EXACT = {"swiglu": torch.nn.functional.silu, "geglu": gelu, "gelu": gelu, "relu": torch.relu}
EXACT["relu2"] = lambda x: torch.relu(x) ** 2


@here
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_activations_are_those_of_fp64(activation: str, dropout: bool) -> None:
    """Over all magnitudes, in rows that are no multiple of a vector."""
    h_RGF = (random(40, 2 if activation in GATED_ACTIVATIONS else 1, 83) * 4).bfloat16()
    h_RGF[0, 0, :9] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e15, -12.0, -5.0])
    da_RF, keep_RF = random(40, 83, seed=1).bfloat16(), None
    if dropout:
        keep_RF = ((random(40, 83, seed=2) > -0.5) * 1.25).bfloat16()
    exact_RGF = h_RGF.double().requires_grad_()
    a_RF = EXACT[activation](exact_RGF[:, 0]) * (exact_RGF[:, 1] if activation in GATED_ACTIVATIONS else 1)
    a_RF = a_RF if keep_RF is None else a_RF * keep_RF
    (dh_RGF,) = torch.autograd.grad(a_RF, exact_RGF, da_RF.double())
    got = GEMM.activate(h_RGF, activation, keep_RF).x_RK, *GEMM.activate_back(h_RGF, da_RF, activation, keep_RF)
    wanted = a_RF.detach(), a_RF.detach(), dh_RGF.flatten(1)
    for mine, exact, slack in zip(got[:3], wanted, (1e-37, 1e-37, 1e-4), strict=True):
        # Rounding to the 8 bits of bf16, and 1e-5 for fp32. A slope that is a difference is as exact as its terms.
        assert ((mine.double() - exact).abs() <= (2**-8 + 1e-5) * exact.abs() + slack).all()
    assert torch.equal(got[3].x_RK, got[2])


@here
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_experts_are_the_loop(activation: str) -> None:
    """With bias and dropout; each of two products in a row rounds to bf16 once more than in fp64."""
    keep_RF, found = kept(inputs(activation, torch.bfloat16)), []
    for backend, dtype in (
        (loop_experts, torch.float64),
        (experts_with(Reference()), torch.bfloat16),
        (expert_backend("native").run, torch.bfloat16),
    ):
        x, *weights, b_in = (t.detach().to(dtype).requires_grad_() for t in inputs(activation, torch.bfloat16))
        out = backend(x, COUNTS, *weights, activation, b_in, keep_RF.to(dtype))
        grads = torch.autograd.grad(out, (x, *weights, b_in), random(*out.shape, seed=9).bfloat16().to(dtype))
        found.append([t.double() for t in (out.detach(), *grads)])
    for exact, plain, mine in zip(*found, strict=True):
        # Slopes that jump at 0 do so elsewhere where h is rounded.
        assert relative(mine, exact) <= 1.05 * relative(plain, exact) < (4e-2 if activation == "relu" else 1e-2)


@here
def test_experts_read_rows_where_they_lie() -> None:
    got, wanted = (read_in_place(GEMM, inputs("swiglu", torch.bfloat16), gathered=g) for g in (False, True))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[2], wanted[2]) and torch.equal(got[3], wanted[3])
    assert_near(got[1], wanted[1], bar=5e-3)  # a token's rows are added up in bf16
