"""RMSNorm (ops/norm.py) in Triton: a row is read once in each direction.

Legend: R rows, D hidden.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.triton.jit import jit
from ops.triton.tiling import programs


@jit
def rms_norm_forward(x_ptr, weight_ptr, y_ptr, scale_ptr, D, eps, BLOCK: tl.constexpr):
    """y = x * scale * weight with scale [R] = 1 / sqrt(mean(x^2) + eps), fp32. One program a row, D <= BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    here = columns < D
    x = tl.load(x_ptr + row * D + columns, mask=here, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + columns, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=here)
    tl.store(scale_ptr + row, scale)


@jit(do_not_specialize=["R"])
def rms_norm_backward(x_ptr, weight_ptr, dy_ptr, scale_ptr, dx_ptr, parts_ptr, R, D, BLOCK: tl.constexpr):
    """dx, and in parts [programs, D] each program's share of the weight's gradient, added up in the order of rows."""
    columns = tl.arange(0, BLOCK)
    here = columns < D
    weight = tl.load(weight_ptr + columns, mask=here, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        place = (tl.zeros((BLOCK,), dtype=tl.int64) + row) * D + columns
        x = tl.load(x_ptr + place, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = x * scale
        share += dy * normed
        dy *= weight
        dx = scale * (dy - normed * (tl.sum(dy * normed, axis=0) / D))
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=here)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + columns, share, mask=here)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        (rows, hidden), x_RD = x_RD.shape, x_RD.contiguous()
        y_RD, scale_R = torch.empty_like(x_RD), x_RD.new_empty(rows, dtype=torch.float32)
        ctx.launch = {"BLOCK": triton.next_power_of_2(hidden), "num_warps": 8 if hidden > 2048 else 4}
        if rows:
            rms_norm_forward[(rows,)](x_RD, weight_D, y_RD, scale_R, hidden, eps, **ctx.launch)
        ctx.save_for_backward(x_RD, weight_D, scale_R)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weight_D, scale_R = ctx.saved_tensors
        (rows, hidden), dx_RD = x_RD.shape, torch.empty_like(x_RD)
        parts_PD = x_RD.new_empty((4 * programs(x_RD.device), hidden), dtype=torch.float32)
        rms_norm_backward[(len(parts_PD),)](
            x_RD, weight_D, dy_RD.contiguous(), scale_R, dx_RD, parts_PD, rows, hidden, **ctx.launch
        )
        return dx_RD, parts_PD.sum(0).to(weight_D.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """ops.norm.Norm, for a last dimension that fits a program's registers."""
    if weight.shape[0] > 16384:
        raise ValueError(f"{weight.shape[0]} values a row are too many for one program")
    return _RMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)
