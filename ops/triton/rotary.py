"""Rotation of queries and keys (ops/rotary.py) in Triton: everything is read and written once.

Legend: S sequence, B batch, H heads, N rotated dimensions of a head.
"""

import triton
import triton.language as tl
from torch import Tensor

from ops.triton.jit import jit

HEADS = 8
"""Heads of a program: of a token the angles are read once for them."""
_STRIDES = ["x_s", "x_b", "x_h", "out_s", "out_b", "out_h"]


@jit(do_not_specialize=["B", "H", *_STRIDES])
def rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, B, H, HALF, x_s, x_b, x_h, x_n, out_s, out_b, out_h, out_n,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token and HEADS of its heads; HALF = N / 2 <= BLOCK. Strides are in elements."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // B, token % B
    heads, n = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    wide = heads.to(tl.int64)[:, None]
    here = (heads < H)[:, None] & (n < HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + n, mask=n < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + n, mask=n < HALF, other=0.0)[None, :]
    if BACKWARD:
        sin = -sin
    x = x_ptr + s * x_s + b * x_b + wide * x_h + n[None, :] * x_n
    first = tl.load(x, mask=here, other=0.0).to(tl.float32)
    second = tl.load(x + HALF * x_n, mask=here, other=0.0).to(tl.float32)
    out = out_ptr + s * out_s + b * out_b + wide * out_h + n[None, :] * out_n
    kind = out_ptr.dtype.element_ty
    tl.store(out, (first * cos - second * sin).to(kind), mask=here)
    tl.store(out + HALF * out_n, (second * cos + first * sin).to(kind), mask=here)


def apply_rotary(x_SBHN: Tensor, cos: Tensor, sin: Tensor, out_SBHN: Tensor, *, backward: bool = False) -> Tensor:
    """ops.rotary.apply_rotary."""
    s, b, h, width = x_SBHN.shape
    if x_SBHN.numel():
        rotate[(s * b, triton.cdiv(h, HEADS))](
            x_SBHN, cos.contiguous(), sin.contiguous(), out_SBHN, b, h, width // 2, *x_SBHN.stride(),
            *out_SBHN.stride(), BACKWARD=backward, HEADS=HEADS, BLOCK=triton.next_power_of_2(width // 2),
        )  # fmt: skip
    return out_SBHN
