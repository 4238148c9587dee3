"""Rotary position embedding of queries and keys.

Legend: S sequence (this rank's slice), B batch, H heads of this rank, N width of a head, W rotated dimensions of one.
"""

import math
from typing import Any

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

    cos: Tensor
    sin: Tensor
    long_cos: Tensor
    long_sin: Tensor

    def __init__(self, width: int, theta: float, max_positions: int, scaling: RopeScalingConfig = UNSCALED):
        super().__init__()
        unscaled = theta ** -(torch.arange(0, width, 2) / width)
        self._register("cos", "sin", scaled(unscaled, theta, scaling), max_positions, attention_factor(scaling))
        self.short_length: int | None = None
        """LongRoPE: the length of a sequence up to which the frequencies are these. None: they always are."""
        if scaling.type == "longrope":
            self.short_length = scaling.original_max_position_embeddings
            long = unscaled / torch.tensor(scaling.long_factor)
            self._register("long_cos", "long_sin", long, max_positions, scaling.long_mscale)

    def _register(self, cos: str, sin: str, frequencies: Tensor, positions: int, factor: float) -> None:
        angle = torch.outer(torch.arange(positions).float(), frequencies)
        self.register_buffer(cos, angle.cos() * factor, persistent=False)
        self.register_buffer(sin, angle.sin() * factor, persistent=False)

    def forward(self, positions_SB: Tensor, length: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """cos and sin [S, B, 1, W/2], fp32, contiguous.

        Args:
            length: of the whole sequence, of which LongRoPE's frequencies depend; or that of each sequence [B].
        """
        tables = (self.cos, self.sin)
        if isinstance(length, Tensor):
            if self.short_length is not None:
                return self._by_length(positions_SB, length > self.short_length)
        elif self.short_length is not None and length > self.short_length:
            tables = (self.long_cos, self.long_sin)
        # What an index gives lies in memory as the index does, which may be a batch turned round.
        cos, sin = (table[positions_SB].unsqueeze(2).contiguous() for table in tables)
        return cos, sin

    def _by_length(self, positions_SB: Tensor, is_long_B: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, with LongRoPE's frequencies of each sequence by itself."""
        both = ((self.cos, self.long_cos), (self.sin, self.long_sin))
        is_long = is_long_B.to(positions_SB.device).view(1, -1, 1, 1)
        chosen = (
            long[positions_SB].unsqueeze(2).where(is_long, short[positions_SB].unsqueeze(2)) for short, long in both
        )
        cos, sin = (table.contiguous() for table in chosen)
        return cos, sin

    @staticmethod
    def rotate(
        x_SBHN: Tensor,
        cos: Tensor,
        sin: Tensor,
        apply: ApplyRotary = apply_rotary,
        *,
        first: int = 0,
        interleave: bool = False,
        scale: float = 1.0,
    ) -> Tensor:
        """Rotates W dimensions of x and copies the others. In fp32 whatever the precision of x.

        Args:
            cos, sin: [S, B, 1, W/2].
            first: of the dimensions that are rotated.
            interleave: pairs are adjacent in x; in the result they are a dimension of the first half and one of the
                second half.
            scale: factor of the result.
        """
        how = apply, first, interleave, scale
        if torch.is_grad_enabled():
            return _Rotate.apply(x_SBHN, cos, sin, *how)
        return _rotated(x_SBHN, *_scaled_angles(cos, sin, scale), *how)


def scaled(frequencies: Tensor, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """The frequencies [W/2] of a rotary embedding after scaling (transformers/modeling_rope_utils.py)."""
    original = scaling.original_max_position_embeddings
    if scaling.type is None:
        return frequencies
    if scaling.type == "longrope":  # of sequences that are not longer than those of pre-training
        return frequencies / torch.tensor(scaling.short_factor)
    low = frequencies / scaling.factor
    if scaling.type == "linear":
        return low
    assert original is not None
    if scaling.type == "llama3":
        rotations = original * frequencies / (2 * math.pi)
        between = scaling.high_freq_factor - scaling.low_freq_factor  # 0: none is interpolated
        kept = rotations - scaling.low_freq_factor
        kept = kept / between if between else (kept >= 0).float()
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
    if scaling.type == "longrope":
        return scaling.short_mscale
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def softmax_scale(scaling: RopeScalingConfig) -> float:
    """The further factor of attention scores in DeepSeek's latent attention, beside 1 / sqrt(N)."""
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2 if scaling.mscale_all_dim else 1.0


def yarn_mscale(factor: float, mscale: float) -> float:
    """arXiv:2309.00071, eq. 22, with DeepSeek's mscale."""
    return 0.1 * mscale * math.log(factor) + 1


class _Rotate(torch.autograd.Function):
    """Keeps nothing of x for the backward pass, which rotates by the negative angles."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SBHN: Tensor,
        cos: Tensor,
        sin: Tensor,
        apply: ApplyRotary,
        first: int,
        interleave: bool,
        scale: float,
    ) -> Tensor:
        cos, sin = _scaled_angles(cos, sin, scale)
        ctx.save_for_backward(cos, sin)
        ctx.how = apply, first, interleave, scale
        return _rotated(x_SBHN, cos, sin, apply, first, interleave, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBHN: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), (apply, first, interleave, scale) = ctx.saved_tensors, ctx.how
        dx_SBHN = grad_SBHN.new_empty(grad_SBHN.shape)
        grad, dx = _rotated_part(grad_SBHN, dx_SBHN, first, 2 * cos.shape[-1], scale)
        if interleave:
            halves = apply(grad, cos, sin, torch.empty_like(dx), backward=True).unflatten(-1, (2, -1))
            dx.unflatten(-1, (-1, 2)).mT.copy_(halves)
        else:
            apply(grad, cos, sin, dx, backward=True)
        return dx_SBHN, *(None,) * 6


def _scaled_angles(cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return (cos * scale, sin * scale) if scale != 1 else (cos, sin)


def _rotated(
    x_SBHN: Tensor, cos: Tensor, sin: Tensor, apply: ApplyRotary, first: int, interleave: bool, scale: float
) -> Tensor:
    """Rotary.rotate, of cosines and sines that the scale is part of."""
    s, b, h, n = x_SBHN.shape
    # In memory heads come before the sequence, as attention reads them: on a CPU it takes a tenth less time then.
    out_SBHN = x_SBHN.new_empty((b, h, s, n)).permute(2, 0, 1, 3)
    x, out = _rotated_part(x_SBHN, out_SBHN, first, 2 * cos.shape[-1], scale)
    apply(x.unflatten(-1, (-1, 2)).mT.flatten(-2) if interleave else x, cos, sin, out)
    return out_SBHN


def _rotated_part(x_SBHN: Tensor, out_SBHN: Tensor, first: int, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """The rotated dimensions of x and of out; the others of out are set."""
    if width == x_SBHN.shape[-1]:
        return x_SBHN, out_SBHN
    widths = [first, width, x_SBHN.shape[-1] - first - width]
    (before, x, after), (out_before, out, out_after) = (t.split(widths, -1) for t in (x_SBHN, out_SBHN))
    for source, target in ((before, out_before), (after, out_after)):
        torch.mul(source, scale, out=target) if scale != 1 else target.copy_(source)
    return x, out
