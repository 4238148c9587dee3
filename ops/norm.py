"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4) as an operation.

Legend: R rows, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import te
from ops.operation import Implementation, Operation
from ops.run_context import RunContext
from parallel.chunked_ops import CPU_VALUES, rows_at_once

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""(x [..., D], weight [D], eps) -> normalised x."""


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class _InBlocks(torch.autograd.Function):
    """In fp32 block by block. A CPU has no kernel for it: torch's own is eight operations over the whole of x."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.rows = rows_at_once(x_RD.shape[1], x_RD.device)
        y_RD, scale_R1 = torch.empty_like(x_RD), x_RD.new_empty((x_RD.shape[0], 1), dtype=torch.float32)
        for x, y, scale in zip(*(t.split(ctx.rows) for t in (x_RD, y_RD, scale_R1)), strict=True):
            x = x.float()
            scale.copy_(torch.linalg.vecdot(x, x)[:, None].div_(x.shape[1]).add_(eps).rsqrt_())
            y.copy_((x * scale).mul_(weight_D))
        ctx.save_for_backward(x_RD, weight_D, scale_R1)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale and g = dy * weight: dx = scale * (g - n * mean(g * n)), dweight = sum(dy * n)."""
        x_RD, weight_D, scale_R1 = ctx.saved_tensors
        dx_RD, weight = torch.empty_like(x_RD), weight_D.float()
        dweight = torch.zeros_like(weight)
        parts = (t.split(ctx.rows) for t in (x_RD, dy_RD, scale_R1, dx_RD))
        for x, dy, scale, dx in zip(*parts, strict=True):
            n, dy = x.float() * scale, dy.float()
            dy_n = dy * n
            dweight += dy_n.sum(0)
            mean = torch.mv(dy_n, weight).div_(x.shape[1])[:, None]
            dx.copy_((dy * weight).addcmul_(n, mean, value=-1).mul_(scale))
        return dx_RD, dweight.to(weight_D.dtype), None


def rms_norm_in_blocks(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """torch_rms_norm for a CPU. x: [..., D]."""
    if not torch.is_grad_enabled() and x.numel() <= CPU_VALUES:  # a block: torch's operations find it in cache, too
        return torch_rms_norm(x, weight_D, eps)
    return _InBlocks.apply(x.reshape(-1, x.shape[-1]), weight_D, eps).view(x.shape)


def _apex(context: RunContext) -> Norm:
    from apex.normalization.fused_layer_norm import (  # pyright: ignore[reportMissingImports]
        fused_rms_norm_affine,
    )

    return lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


def _te(context: RunContext) -> Norm:
    def make() -> Norm:
        from transformer_engine.pytorch import RMSNorm  # pyright: ignore[reportMissingImports]

        def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            # A layer's backward pass reads its parameter: the one that it is called with has to stay.
            module = RMSNorm(weight.shape[0], eps=eps, device="meta", dtype=weight.dtype)
            module._parameters["weight"] = weight
            return module(x)

        return norm

    return te.load(make)


def _trial(norm: Norm, context: RunContext) -> list[Tensor]:
    """Rows of every width that the run has: of the hidden size and, with qk_norm, of queries and keys."""
    model, results = context.model, []
    heads = [] if model.qk_norm is None else [model.head_width]
    if model.qk_norm == "full":
        heads = [model.query_width, model.key_width]
    for width in (model.hidden_size, *heads):
        x, weight = (context.randn(*shape, seed=len(shape)).requires_grad_() for shape in ((8, width), (width,)))
        y = norm(x, weight, model.norm_eps)
        results += [y.detach(), *torch.autograd.grad(y, (x, weight), context.randn(8, width))]
    return results


RMS_NORM: Operation[Norm] = Operation(
    field="rms_norm",
    name="norm",
    reference=lambda context: Implementation("torch rms_norm", lambda context: torch_rms_norm),
    implementations=[
        Implementation("Triton", "ops.triton.rms_norm:rms_norm", device="cuda"),
        Implementation("blocks of rows in cache", lambda context: rms_norm_in_blocks, device="cpu"),
        Implementation(te.NAME, _te, device="cuda", dtypes=(torch.bfloat16,), is_supported=te.is_meant),
        Implementation("Apex", _apex),
    ],
    trial=_trial,
    is_used=lambda context: (
        context.model.norm == "rmsnorm" or (context.model.qk_norm or context.model.kv_lora_rank) is not None
    ),
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
)
