"""FP8 linear layers on torch's own scaled matrix product. Imports Triton, as ops/triton/gemm_backend.py does.

Legend: R rows, K inner and N outer dimension of a product, L groups of rows: one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from ops.fp8_numerics import BLOCK, Block
from ops.gemm_backend import Weight, main_gradient
from ops.triton.gemm_backend import SCALE_ROWS, Float8GemmBackend, Groups, Operand

KINDS: dict[Block, ScalingType] = {
    (1, BLOCK): ScalingType.BlockWise1x128,
    (BLOCK, 1): ScalingType.BlockWise1x128,
    (BLOCK, BLOCK): ScalingType.BlockWise128x128,
    (1, None): ScalingType.RowWise,
    (None, 1): ScalingType.RowWise,
    (None, None): ScalingType.TensorWise,
}
"""torch's names. It counts a block of the right operand along that one's inner dimension first."""

ALIGNED = 4
"""fp32 scales in 16 bytes. cuBLASLt expects the columns of 128 x 128 scales to begin at a multiple of these; of 1 x
128 torch does not say so, and we keep to it."""


class ScaledMmBackend(Float8GemmBackend):
    """Rounds as Float8GemmBackend and multiplies with torch.nn.functional.scaled_mm: cuBLASLt's kernels, or CUTLASS's
    for rowwise scales on a GPU other than Hopper. Blockwise scales it takes on Hopper alone (compute capability 9.0).
    For layers whose rows are one group: it has no ragged form that takes every recipe."""

    def weight(self, w_LKN: Tensor) -> Weight:
        weight = super().weight(w_LKN)
        return Weight(_aligned(weight.forward), _aligned(weight.back)) if self.blockwise else weight

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Operand:
        assert row_R is None  # a linear layer's rows are never gathered
        missing = -len(x_RK) % SCALE_ROWS  # torch takes scales without a gap between blocks
        return super().rows(F.pad(x_RK, (0, 0, 0, missing)) if missing else x_RK)

    def product(self, x_RK: Operand, w_LKN: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
        (rows,) = groups.counts
        assert x_RK.scale is not None and w_LKN.scale is not None
        kinds = KINDS[self.recipe.rows], KINDS[self.recipe.weight]
        return _multiply(x_RK.values, w_LKN.values[0], (x_RK.scale, w_LKN.scale[0]), kinds, dtype)[:rows]

    def weight_gradient(self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: Groups, w: Tensor) -> Tensor:
        if not self.narrow_weight_gradient:
            return super().weight_gradient(x_RK, dy_RN, groups, w)
        (x_KR, x_scale), (dy_NR, dy_scale) = x_RK, dy_RN
        kind = KINDS[self.recipe.columns]
        if kind is ScalingType.BlockWise1x128:
            scales = x_scale.t(), dy_scale.t()
        elif kind is ScalingType.RowWise:  # all tiles of the only group share their scales
            scales = x_scale[0].unsqueeze(1), dy_scale[:1]
        else:
            scales = x_scale[0, 0], dy_scale[0, 0]
        dw = _multiply(x_KR, dy_NR.t(), scales, (kind, kind), torch.float32).view(w.shape)
        main = main_gradient(w)
        if main is None:
            return dw.to(w.dtype)
        main += dw
        return torch.empty_like(w)


def _multiply(
    a: Tensor, b: Tensor, scales: Sequence[Tensor], kinds: Sequence[ScalingType], dtype: torch.dtype
) -> Tensor:
    """a [R, K] @ b [K, N]: rows of a and columns of b are contiguous."""
    # Not with fast accumulation: sums move to fp32 as in our own kernels.
    return F.scaled_mm(a, b, scales[0], kinds[0], scales[1], kinds[1], output_dtype=dtype, use_fast_accum=False)


def _aligned(w: Operand) -> Operand:
    """The scales [L, K / 128, N / 128] along the inner dimension first, and of that a multiple of four: with fewer,
    cuBLASLt reads those of the next column."""
    assert w.scale is not None
    scale = F.pad(w.scale.transpose(1, 2), (0, -w.scale.shape[1] % ALIGNED)).contiguous()
    return Operand(w.values, scale.transpose(1, 2))
