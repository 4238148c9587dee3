"""FP8 rounding against a table of all E4M3 numbers, and what it costs in accuracy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops.fp8_numerics import BLOCK, E4M3_MAX, RECIPES, quantise
from tests.moe.helpers import random


def e4m3_numbers() -> list[float]:
    """Every finite E4M3 number by its definition (arXiv:2209.05433, table 1): 4 exponent bits, bias 7, 3 mantissa bits,
    no infinity, all ones is not a number."""
    positive = [m / 8 * 2**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return sorted({sign * x for x in positive for sign in (-1, 1)})


NUMBERS = torch.tensor(e4m3_numbers(), dtype=torch.float64)


def rounded(block: Tensor) -> Tensor:
    """The nearest E4M3 multiples of the block's scale, in float64; ties between neighbours are left out by the data."""
    amax = block.abs().max().item()
    scale = 2.0 ** math.ceil(math.log2(amax / E4M3_MAX)) if amax else 1.0
    return NUMBERS[(block[..., None] / scale - NUMBERS).abs().argmin(-1)] * scale


@pytest.mark.parametrize("block", [(1, 4), (3, 4), (4, 1), (1, None), (None, 1), (None, None)])
def test_each_block_is_rounded_by_its_own_scale(block: tuple[int | None, int | None]) -> None:
    """Ragged blocks at both ends, magnitudes from 1e-9 to 1e9, a row and a column of zeros."""
    x = random(7, 10) * 10.0 ** torch.arange(-9, 1).roll(3) * 10.0 ** torch.arange(-3, 4)[:, None] * 1e3
    x[2], x[:, 5] = 0, 0
    got = quantise(x, block).dequantise(torch.float64)
    height, width = block[0] or 7, block[1] or 10
    for rows in torch.arange(7).split(height):
        for columns in torch.arange(10).split(width):
            part = x[rows][:, columns].double()
            assert torch.equal(got[rows][:, columns], rounded(part))


@given(amax=st.floats(2.0**-90, 2.0**90, width=32))
def test_scales_are_powers_of_two_that_use_the_range(amax: float) -> None:
    scale = quantise(torch.tensor([[amax]]), (1, 1)).scale.item()
    assert math.frexp(scale)[0] == 0.5
    assert E4M3_MAX / 2 * (1 - 1e-6) < amax / scale <= E4M3_MAX * (1 + 1e-6)


def test_bf16_holds_what_was_rounded() -> None:
    """So a bf16 product of rounded operands is what an FP8 product computes."""
    quantised = quantise(random(64, 300) * 10.0 ** torch.linspace(-20, 20, 300), (1, BLOCK))
    assert torch.equal(quantised.dequantise(torch.bfloat16).double(), quantised.dequantise(torch.float64))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_number_breaks_its_block_and_no_other(broken: float) -> None:
    x = random(2, 2 * BLOCK)
    x[1, 3] = broken
    finite = quantise(x, (1, BLOCK)).dequantise().isfinite()
    assert finite[0].all() and finite[1, BLOCK:].all() and not finite[1, 3]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_a_product_loses_less_than_four_percent(recipe: str, outliers: bool) -> None:
    """Forward, input gradient and weight gradient of one product, against the same product in fp32."""
    x, w, dy = random(384, 512), random(512, 256, seed=1) * 0.02, random(384, 256, seed=2) * 1e-6
    if outliers:
        x[:, ::61] *= 50
        dy = dy * (1.5 * random(384, 1, seed=3)).exp()
    blocks = RECIPES[recipe]

    def round_trip(t: Tensor, block: tuple[int | None, int | None]) -> Tensor:
        return quantise(t, block).dequantise()

    rows, grads = round_trip(x, blocks.rows), round_trip(dy, blocks.rows)
    products = [
        (rows @ round_trip(w, blocks.weight), x @ w),
        (grads @ round_trip(w, blocks.weight_back).t(), dy @ w.t()),
        (round_trip(x, blocks.columns).t() @ round_trip(dy, blocks.columns), x.t() @ dy),
    ]
    for got, wanted in products:
        assert 0.01 < ((got - wanted).norm() / wanted.norm()).item() < 0.04


def test_a_transposed_block_of_a_weight_is_rounded_the_same() -> None:
    """So one copy of a weight serves forward and backward."""
    w = random(200, 300)
    back = quantise(w.t(), RECIPES["blockwise"].weight_back).dequantise()
    assert torch.equal(back, quantise(w, RECIPES["blockwise"].weight).transpose().dequantise().contiguous())
