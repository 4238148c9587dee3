"""Rotary position embedding of queries and keys.

Legend: S sequence (this rank's slice), B batch, H heads of this rank, N width of a head, W rotated dimensions of one.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import RopeScalingConfig
from ops.rotary import ApplyRotary, apply_rotary

UNSCALED = RopeScalingConfig()


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Args:
        width: number of dimensions of a head that are rotated.
    """

    def __init__(self, width: int, theta: float, max_positions: int, scaling: RopeScalingConfig = UNSCALED):
        super().__init__()
        frequencies = scaled(theta ** -(torch.arange(0, width, 2) / width), theta, scaling)
        angle = torch.outer(torch.arange(max_positions).float(), frequencies)
        factor = attention_factor(scaling)
        self.register_buffer("cos", angle.cos() * factor, persistent=False)
        self.register_buffer("sin", angle.sin() * factor, persistent=False)

    def forward(self, positions_SB: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [S, B, 1, W/2], fp32, contiguous."""
        # What an index gives lies in memory as the index does, which may be a batch turned round.
        return tuple(table[positions_SB].unsqueeze(2).contiguous() for table in (self.cos, self.sin))

    @staticmethod
    def rotate(
        x_SBHN: Tensor, cos: Tensor, sin: Tensor, apply: ApplyRotary = apply_rotary, *, interleave: bool = False
    ) -> Tensor:
        """Rotates the first W dimensions of x and copies the others. In fp32 whatever the precision of x.

        Args:
            cos, sin: [S, B, 1, W/2].
            interleave: pairs are adjacent in x; in the result they are a dimension of the first half and one of the
                second half.
        """
        return _Rotate.apply(x_SBHN, cos, sin, apply, interleave)


def scaled(frequencies: Tensor, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """The frequencies [W/2] of a rotary embedding after scaling (transformers/modeling_rope_utils.py)."""
    original = scaling.original_max_position_embeddings
    if scaling.type is None:
        return frequencies
    low = frequencies / scaling.factor
    if scaling.type == "linear":
        return low
    assert original is not None
    if scaling.type == "llama3":
        rotations = original * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        width = 2 * len(frequencies)
        first, last = (_dimension(b, width, theta, original) for b in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last += 0.001 * (first == last)
        kept = 1 - (torch.arange(len(frequencies)) - first) / (last - first)
    return torch.lerp(low, frequencies, kept.clamp(0, 1))


def _dimension(rotations: float, width: int, theta: float, original: int) -> float:
    """The dimension whose frequency rotates so many times within the original length (arXiv:2309.00071, eq. 14)."""
    return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def attention_factor(scaling: RopeScalingConfig) -> float:
    """The factor of rotated queries and keys."""
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """arXiv:2309.00071, eq. 22, with DeepSeek's mscale."""
    return 0.1 * mscale * math.log(factor) + 1


class _Rotate(torch.autograd.Function):
    """Keeps nothing of x for the backward pass, which rotates by the negative angles."""

    @staticmethod
    def forward(ctx, x_SBHN: Tensor, cos: Tensor, sin: Tensor, apply: ApplyRotary, interleave: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.apply_rotary, ctx.interleave = apply, interleave
        s, b, h, n = x_SBHN.shape
        # In memory heads come before the sequence, as attention reads them: on a CPU it takes a tenth less time then.
        out_SBHN = x_SBHN.new_empty((b, h, s, n)).permute(2, 0, 1, 3)
        x, out = _rotated_part(x_SBHN, out_SBHN, 2 * cos.shape[-1])
        apply(x.unflatten(-1, (-1, 2)).mT.flatten(-2) if interleave else x, cos, sin, out)
        return out_SBHN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SBHN: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        dx_SBHN = grad_SBHN.new_empty(grad_SBHN.shape)
        grad, dx = _rotated_part(grad_SBHN, dx_SBHN, 2 * cos.shape[-1])
        if ctx.interleave:
            dx.unflatten(-1, (-1, 2)).mT.copy_(
                ctx.apply_rotary(grad, cos, sin, torch.empty_like(dx), backward=True).unflatten(-1, (2, -1))
            )
        else:
            ctx.apply_rotary(grad, cos, sin, dx, backward=True)
        return dx_SBHN, None, None, None, None


def _rotated_part(x_SBHN: Tensor, out_SBHN: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` dimensions of x and out; the others are copied to out."""
    if width == x_SBHN.shape[-1]:
        return x_SBHN, out_SBHN
    out_SBHN[..., width:].copy_(x_SBHN[..., width:])
    return x_SBHN[..., :width], out_SBHN[..., :width]
