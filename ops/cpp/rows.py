"""Losses and norms of bf16 rows in C++ (rows.cpp).

Legend: T tokens, V vocabulary (this rank's slice), R rows, D hidden, P parts of the rows.
"""

from ctypes import c_float, c_int64
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.cpp.build import data_of, library, threads
from ops.fused_cross_entropy import losses_with

PART = 64
"""Rows over which a norm's weight gradient is added up at once."""


class _Losses:
    """For ops.fused_cross_entropy."""

    def sums(self, logits_TV: Tensor, mine_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert logits_TV.dtype == torch.bfloat16 and mine_T.dtype == torch.int64
        tokens, vocabulary = logits_TV.shape
        largest_T, sum_T, label_T = (logits_TV.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        library().switchyard_cross_entropy_sums(
            c_int64(tokens), c_int64(vocabulary),
            *map(data_of, (logits_TV, mine_T, largest_T, sum_T, label_T)), threads(),
        )  # fmt: skip
        return largest_T, sum_T, label_T

    def become_gradient(
        self, logits_TV: Tensor, mine_T: Tensor, largest_T: Tensor, sum_T: Tensor, grad_T: Tensor
    ) -> None:
        assert grad_T.dtype == torch.float32
        library().switchyard_cross_entropy_gradient(
            *map(c_int64, logits_TV.shape), *map(data_of, (logits_TV, mine_T, largest_T, sum_T, grad_T)), threads()
        )


token_losses = losses_with(_Losses())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        assert x_RD.dtype == weight_D.dtype == torch.bfloat16
        x_RD, weight_D = x_RD.contiguous(), weight_D.contiguous()
        y_RD, scale_R = torch.empty_like(x_RD), x_RD.new_empty(len(x_RD), dtype=torch.float32)
        library().switchyard_rms_norm(
            *map(c_int64, x_RD.shape), data_of(x_RD), data_of(weight_D), c_float(eps),
            data_of(y_RD), data_of(scale_R), threads(),
        )  # fmt: skip
        ctx.save_for_backward(x_RD, weight_D, scale_R)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        (x_RD, weight_D, scale_R), dy_RD = ctx.saved_tensors, dy_RD.contiguous()
        dx_RD = torch.empty_like(x_RD)
        parts_PD = x_RD.new_empty((-(-len(x_RD) // PART), x_RD.shape[1]), dtype=torch.float32)
        library().switchyard_rms_norm_back(
            *map(c_int64, x_RD.shape), *map(data_of, (x_RD, weight_D, scale_R, dy_RD, dx_RD, parts_PD)),
            c_int64(PART), threads(),
        )  # fmt: skip
        return dx_RD, parts_PD.sum(0).to(weight_D.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """ops.norm.Norm."""
    return _RMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)
