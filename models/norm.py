"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

Legend: R rows, D hidden.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops.cpp import build as native
from ops.registry import Candidate, Norm
from parallel.chunked_ops import rows_at_once
from parallel.process_groups import Groups
from parallel.sharding import set_sharding


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        function: the implementation (ops.registry.select_norm).
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        function: Norm,
        dtype: torch.dtype,
        sequence_parallel: bool,
        groups: Groups,
    ):
        super().__init__()
        self.eps, self.function = eps, function
        self.weight = set_sharding(nn.Parameter(torch.empty(hidden_size, dtype=dtype)), replicas=(groups.tp,))
        # Under sequence parallelism each tensor-parallel rank sees other tokens: Megatron-Core then sums this
        # gradient over the tensor-parallel group.
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class _InBlocks(torch.autograd.Function):
    """In fp32 block by block. A CPU has no kernel for it: torch's own is eight operations over the whole of x."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
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
    def backward(ctx, dy_RD: Tensor) -> tuple[Tensor, Tensor, None]:
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
    """ops.registry.torch_rms_norm for a CPU. x: [..., D]."""
    return _InBlocks.apply(x.reshape(-1, x.shape[-1]), weight_D, eps).view(x.shape)


def _triton_rms_norm() -> Norm:
    from ops.triton.rms_norm import rms_norm

    return rms_norm


def _native_rms_norm() -> Norm:
    from ops.cpp.rows import rms_norm

    return rms_norm


def our_norms(device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """For ops.registry.select_norm, the best first."""
    if device.type != "cpu":
        return [Candidate("Triton", _triton_rms_norm)]
    blocks = Candidate("blocks of rows in cache", lambda: rms_norm_in_blocks)
    return [native.candidate(_native_rms_norm), blocks] if native.made_for(device, dtype) else [blocks]
