"""Activations of the experts in Triton, with their gradients, rounded to FP8 in the same pass where a product follows.

Legend: R rows, F expert hidden, G 2 for gated activations (gate, up), else 1. Blocks are 128 wide: BLOCK.
"""

import triton.language as tl

from ops.triton.fp8_cast import inverse, scale_bits
from ops.triton.jit import jit

KINDS = {"swiglu": "silu", "geglu": "gelu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
"""The nonlinearity of each activation of ops.activations."""


@jit
def nonlinear(x, KIND: tl.constexpr):
    """(f(x), f'(x)) in fp32."""
    if KIND == "silu":
        s = 1 / (1 + tl.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2 * positive
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)


@jit
def _write(
    x, ptr, q_ptr, scale_ptr, R, F, stride_scale, half, halves, model_type: tl.constexpr, ROUND: tl.constexpr,
    KEEP: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes this program's tile x [BR, BLOCK] of a [R, F] tensor into half `half` of a [R, halves * F] one: as it is
    (KEEP), rounded to FP8 (ROUND), or both."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < R) & (columns[None, :] < F)
    wide, width = rows.to(tl.int64), halves * F
    place = wide[:, None] * width + half * F + columns[None, :]
    if KEEP:
        tl.store(ptr + place, x.to(ptr.dtype.element_ty), mask=mask)
    if ROUND:
        # Through the precision of the model, so that what is kept and what is multiplied are one number.
        x = x.to(model_type).to(tl.float32)
        bits = scale_bits(tl.max(tl.abs(x), axis=1))
        tl.store(q_ptr + place, (x * inverse(bits)[:, None]).to(q_ptr.dtype.element_ty), mask=mask)
        block = half * F // BLOCK + tl.program_id(1)
        scale_ptrs = scale_ptr + block.to(tl.int64) * stride_scale + rows
        tl.store(scale_ptrs, bits.to(tl.float32, bitcast=True), mask=rows < R)


@jit(do_not_specialize=["R"])
def activate(
    h_ptr, keep_ptr, a_ptr, q_ptr, scale_ptr, R, F, stride_scale, KIND: tl.constexpr, G: tl.constexpr,
    DROP: tl.constexpr, ROUND: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a [R, F] = f(h) or f(gate) * up of h [R, G, F], with DROP times keep [R, F], all contiguous; with ROUND the FP8
    values and scales of a instead. The grid is (R / BR, F / BLOCK)."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < R) & (columns[None, :] < F)
    h_ptrs = h_ptr + rows[:, None].to(tl.int64) * G * F + columns[None, :]
    a, _ = nonlinear(tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32), KIND)
    if G == 2:
        a = a * tl.load(h_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    if DROP:
        a = a * tl.load(keep_ptr + rows[:, None].to(tl.int64) * F + columns[None, :], mask=mask, other=0.0)
    _write(a, a_ptr, q_ptr, scale_ptr, R, F, stride_scale, 0, 1, h_ptr.dtype.element_ty, ROUND, not ROUND, BR, BLOCK)


@jit(do_not_specialize=["R"])
def activate_back(
    h_ptr, da_ptr, keep_ptr, a_ptr, dh_ptr, q_ptr, scale_ptr, R, F, stride_scale, KIND: tl.constexpr, G: tl.constexpr,
    DROP: tl.constexpr, ROUND: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From h [R, G, F] and da [R, F], all contiguous: a [R, F] again, dh [R, G * F], and with ROUND the FP8 values and
    scales of dh, for which F is a multiple of BLOCK. The grid is (R / BR, F / BLOCK)."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = rows[:, None].to(tl.int64)
    mask = (rows[:, None] < R) & (columns[None, :] < F)
    h_ptrs = h_ptr + wide * G * F + columns[None, :]
    a, slope = nonlinear(tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32), KIND)
    da = tl.load(da_ptr + wide * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    keep = 1.0
    if DROP:
        keep = tl.load(keep_ptr + wide * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        da = da * keep
    dh = da * slope
    if G == 2:
        up = tl.load(h_ptrs + F, mask=mask, other=0.0).to(tl.float32)
        _write(
            da * a, dh_ptr, q_ptr, scale_ptr, R, F, stride_scale, 1, G, h_ptr.dtype.element_ty, ROUND, True, BR, BLOCK
        )
        dh, a = dh * up, a * up
    _write(dh, dh_ptr, q_ptr, scale_ptr, R, F, stride_scale, 0, G, h_ptr.dtype.element_ty, ROUND, True, BR, BLOCK)
    _write(a * keep, a_ptr, q_ptr, scale_ptr, R, F, stride_scale, 0, 1, h_ptr.dtype.element_ty, False, True, BR, BLOCK)
