"""Rotary position embedding of queries and keys.

Legend: S sequence (this rank's slice), B batch, H heads of this rank, N width of a head.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops.rotary import ApplyRotary, apply_rotary


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), halves instead of interleaved pairs."""

    def __init__(self, width: int, theta: float, max_positions: int):
        super().__init__()
        angle = torch.outer(torch.arange(max_positions).float(), theta ** -(torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, positions_SB: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [S, B, 1, N/2], fp32, contiguous."""
        # What an index gives lies in memory as the index does, which may be a batch turned round.
        return tuple(table[positions_SB].unsqueeze(2).contiguous() for table in (self.cos, self.sin))

    @staticmethod
    def rotate(x_SBHN: Tensor, cos: Tensor, sin: Tensor, apply: ApplyRotary = apply_rotary) -> Tensor:
        """In fp32 whatever the precision of x."""
        return _Rotate.apply(x_SBHN, cos, sin, apply)


class _Rotate(torch.autograd.Function):
    """Keeps nothing of x for the backward pass, which rotates by the negative angles."""

    @staticmethod
    def forward(ctx, x_SBHN: Tensor, cos: Tensor, sin: Tensor, apply: ApplyRotary) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.apply_rotary = apply
        s, b, h, n = x_SBHN.shape
        # In memory heads come before the sequence, as attention reads them: on a CPU it takes a tenth less time then.
        out_SBHN = x_SBHN.new_empty((b, h, s, n)).permute(2, 0, 1, 3)
        return apply(x_SBHN, cos, sin, out_SBHN)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SBHN: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return (
            ctx.apply_rotary(grad_SBHN, cos, sin, grad_SBHN.new_empty(grad_SBHN.shape), backward=True),
            None,
            None,
            None,
        )
