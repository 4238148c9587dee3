"""FP8 numbers in plain torch: the reference that every kernel equals, and what a CPU computes with.

Legend: R rows, K columns, L experts, N columns of a product, B blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BLOCK = 128
"""Width of a block along a product's inner dimension, where a kernel adds its partial sum up in fp32."""
TINY = 2.0**-100
"""Smallest largest magnitude that a block is scaled by: a block of zeros has a scale, and bf16 holds it."""

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all."""


@dataclass(frozen=True)
class Quantised:
    """values * scale, block by block."""

    values: Tensor
    """float8_e4m3fn [..., R, K]."""
    scale: Tensor
    """fp32 powers of two [..., ceil(R / rows), ceil(K / columns)]."""
    block: Block

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., R, K]. Exact in bf16 as in fp32: four significant bits times a power of two."""
        rows, columns = self.values.shape[-2:]
        scale = _spread(self.scale, self.block[0], rows, -2)
        return self.values.to(dtype) * _spread(scale, self.block[1], columns, -1).to(dtype)

    def transpose(self) -> "Quantised":
        """The same numbers with rows and columns exchanged."""
        return Quantised(self.values.transpose(-1, -2), self.scale.transpose(-1, -2), (self.block[1], self.block[0]))


def scale_of(amax: Tensor) -> Tensor:
    """The power of two, rounded up, that brings the largest magnitude amax (fp32) within E4M3's 448. A power of two
    costs no accuracy in a format with an exponent of its own (docs/kernels.md), and makes scaling and its inverse
    exact: what is quantised here and dequantised there is the same number on every device."""
    bits = (amax.clamp(min=TINY) * (1 / E4M3_MAX)).view(torch.int32)
    exponent = (bits + 0x7FFFFF) & 0x7F800000  # up to the next exponent, unless the mantissa is zero
    # Not-a-number and infinity stay what they are: a broken gradient has to show.
    return torch.where(amax.isfinite(), exponent.view(torch.float32), amax)


def quantise(x: Tensor, block: Block) -> Quantised:
    """E4M3 with one scale per block of the last two dimensions, from the block's largest magnitude. Blocks at the end
    may be smaller.

    Args:
        x: [..., R, K] in any floating type.
    """
    rows, columns = x.shape[-2:]
    height, width = block[0] or max(rows, 1), block[1] or max(columns, 1)
    padded = torch.nn.functional.pad(x.float(), (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    scale = scale_of(
        tiles.abs().amax((-3, -1)) if tiles.numel() else tiles.new_zeros((*tiles.shape[:-3], tiles.shape[-2]))
    )
    # Versions of torch differ in what they make of an overflow.
    values = (tiles / scale[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    values = values.flatten(-4, -3).flatten(-2)[..., :rows, :columns]
    return Quantised(values, scale, block)


def _spread(scale: Tensor, size: int | None, whole: int, axis: int) -> Tensor:
    """Repeats the scale of each block for all its elements along an axis."""
    if size is None:
        return scale
    return scale.repeat_interleave(size, axis).narrow(axis, 0, whole)


@dataclass(frozen=True)
class Recipe:
    """Which elements of a product's operands share a scale. A product's inner dimension is K in x [R, K] and in
    w [K, N]."""

    rows: Block
    """Of x, and of the gradient of y."""
    weight: Block
    """Of w [K, N] in the forward product."""
    weight_back: Block
    """Of w [K, N] in the product that gives the gradient of x, whose inner dimension is N."""
    columns: Block
    """Of x and of the gradient of y in the product that gives the gradient of w, whose inner dimension is R."""


RECIPES = {
    # DeepSeek-V3 (arXiv:2412.19437, section 3.3.2 and figure 7), with E4M3 for gradients as well.
    "blockwise": Recipe((1, BLOCK), (BLOCK, BLOCK), (BLOCK, BLOCK), (BLOCK, 1)),
    "rowwise": Recipe((1, None), (None, 1), (1, None), (None, 1)),
    "tensorwise": Recipe((None, None), (None, None), (None, None), (None, None)),
}
