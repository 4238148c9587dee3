"""Rotation of queries and keys by the angles of their positions (Su et al. 2021, arXiv:2104.09864, eq. 34).

Legend: S sequence, B batch, H heads, N width of a head.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ops.operation import Implementation, Operation
from ops.run_context import RunContext
from parallel.chunked_ops import rows_at_once

ApplyRotary = Callable[..., Tensor]
"""The arguments and the result of `apply_rotary`."""


def apply_rotary(x_SBHN: Tensor, cos: Tensor, sin: Tensor, out_SBHN: Tensor, *, backward: bool = False) -> Tensor:
    """Writes x rotated by the angles, or by their negatives, into `out`; returns it. cos, sin: fp32 [S, B, 1, N/2]."""
    sin = -sin if backward else sin
    rows = rows_at_once(math.prod(x_SBHN.shape[1:]), x_SBHN.device)
    whole = x_SBHN, cos, sin, out_SBHN
    blocks = [whole] if len(x_SBHN) <= rows else zip(*(t.split(rows) for t in whole), strict=True)
    for x, c, s, out in blocks:
        (a, b), (first, second) = x.float().chunk(2, -1), out.chunk(2, -1)
        if out.dtype == torch.float32:
            torch.mul(a, c, out=first).addcmul_(b, s, value=-1)
            torch.mul(b, c, out=second).addcmul_(a, s)
            continue
        first.copy_((a * c).addcmul_(b, s, value=-1))
        second.copy_((b * c).addcmul_(a, s))
    return out_SBHN


def _trial(apply: ApplyRotary, context: RunContext) -> list[Tensor]:
    """Of ten tokens, with as many rotated dimensions as the run's heads have."""
    width = context.model.rotary_width
    x, angle = context.randn(5, 2, 3, width), context.randn(5, 2, 1, width // 2, seed=1, dtype=torch.float32)
    return [apply(x, angle.cos(), angle.sin(), torch.empty_like(x), backward=b) for b in (False, True)]


ROTARY = Operation(
    field="apply_rotary",
    name="positions",
    reference=lambda context: Implementation("torch, in blocks", lambda context: apply_rotary, "rotary, in fp32"),
    implementations=[Implementation("Triton", "ops.triton.rotary:apply_rotary", device="cuda")],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
)
