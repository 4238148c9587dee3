"""What the layers multiply with: a linear product with the collectives of tensor parallelism, and the conventions of
the weight gradient.

Legend: R rows, K inner and N outer dimension of a product.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather, reduce_scatter


def add_weight_gradient(weight: Tensor, gradient_NK: Tensor, *, fuse: bool, first: bool | None) -> Tensor:
    """The gradient of a weight as the layers return it. Fused, it is added to weight.main_grad, or replaces it in the
    first micro-batch, and what is returned has no meaning."""
    if not fuse:
        return gradient_NK.to(weight.dtype)
    if first or getattr(weight, "overwrite_main_grad", False):
        weight.main_grad.copy_(gradient_NK)
    else:
        weight.main_grad.add_(gradient_NK)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
    return torch.full_like(weight, torch.nan if not getattr(weight, "zero_out_wgrad", False) else 0.0)


class LinearProduct(torch.autograd.Function):
    """x @ w.T + b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, layer: Any, first: bool | None
    ) -> Tensor:
        assert x.shape[-1] == weight_NK.shape[1], "GEMM not possible"
        ctx.layer, ctx.first, ctx.weight, ctx.has_bias = layer, first, weight_NK, bias_N is not None
        whole = all_gather(x, layer.tp_group) if layer.sequence_parallel and layer.parallel_mode == "column" else x
        y_RN = torch.mm(whole.reshape(-1, whole.shape[-1]), weight_NK.t())
        y_RN = y_RN if bias_N is None or layer.parallel_mode == "row" else y_RN + bias_N
        y = y_RN.view(*whole.shape[:-1], -1)
        if layer.parallel_mode == "row" and layer.sequence_parallel:
            y = reduce_scatter(y, layer.tp_group)
        elif layer.parallel_mode == "row" and layer.tp_size > 1:
            dist.all_reduce(y, group=layer.tp_group)
        ctx.save_for_backward(x)
        return y if bias_N is None or layer.parallel_mode != "row" else y + bias_N

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer, weight_NK = ctx.saved_tensors, ctx.layer, ctx.weight
        sequence, column = layer.sequence_parallel, layer.parallel_mode == "column"
        dy = all_gather(dy, layer.tp_group) if sequence and layer.parallel_mode == "row" else dy
        whole = all_gather(x, layer.tp_group) if sequence and column else x
        dy_RN, x_RK = dy.reshape(-1, dy.shape[-1]), whole.reshape(-1, whole.shape[-1])
        dx = torch.mm(dy_RN, weight_NK).view(whole.shape)
        if column and sequence:
            dx = reduce_scatter(dx, layer.tp_group)
        elif column and layer.tp_size > 1:
            dist.all_reduce(dx, group=layer.tp_group)
        dw_NK = None
        if ctx.needs_input_grad[1]:
            dw_NK = torch.mm(dy_RN.t(), x_RK)
            dw_NK = add_weight_gradient(weight_NK, dw_NK, fuse=layer.fuse_wgrad_accumulation, first=ctx.first)
        return dx, dw_NK, dy_RN.sum(0) if ctx.has_bias else None, None, None
