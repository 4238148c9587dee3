"""Rounding to FP8 in Triton, bit for bit what ops/fp8_numerics.py computes.

Legend: R rows, K columns, L experts, N columns of a weight. Blocks are 128 wide: BLOCK.
"""

import triton.language as tl

from ops.triton.jit import jit


@jit
def scale_bits(amax):
    """The bits of numerics.scale_of(amax): a power of two."""
    bits = (tl.maximum(amax, 7.888609052210118e-31) * 0.002232142857142857).to(tl.int32, bitcast=True)
    return (bits + 0x7FFFFF) & 0x7F800000


@jit
def inverse(bits):
    """One over a power of two, exactly; 0 over infinity, so that what is infinite becomes not a number."""
    return tl.where(bits < 0x7F800000, (254 << 23) - bits, 0).to(tl.float32, bitcast=True)


@jit(do_not_specialize=["R"])
def round_rows(x_ptr, q_ptr, scale_ptr, R, K, stride_xr, stride_scale, BR: tl.constexpr, BLOCK: tl.constexpr):
    """x [R, K] -> q [R, K], scale transposed [K / BLOCK, R]: one scale for 1 x BLOCK. Products read one block's scales
    of many rows. The grid is (R / BR, K / BLOCK)."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < R) & (columns[None, :] < K)
    wide = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + wide * stride_xr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = scale_bits(tl.max(tl.abs(x), axis=1))
    q = (x * inverse(bits)[:, None]).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + wide * K + columns[None, :], q, mask=mask)
    scale_ptrs = scale_ptr + tl.program_id(1).to(tl.int64) * stride_scale + rows
    tl.store(scale_ptrs, bits.to(tl.float32, bitcast=True), mask=rows < R)


@jit
def round_columns(
    x_ptr, q_ptr, scale_ptr, row_ptr, tiles_ptr, K, padded, stride_xr,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [R, K], or with GATHER [T, K] of which row r is number row[r] -> q transposed [K, padded], scale
    [padded / BLOCK, K]: one scale for BLOCK x 1, every expert's rows filled up with zeros to a multiple of BLOCK. Rows
    come last because that is the inner dimension of the product that they are for. The grid is (row tiles, K / BK); the
    i-th row tile becomes rows BLOCK * i and on."""
    tile = tl.program_id(0)
    begin, end = tl.load(tiles_ptr + 3 * tile + 1), tl.load(tiles_ptr + 3 * tile + 2)
    rows = begin + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (rows[:, None] < end) & (columns[None, :] < K)
    read = rows.to(tl.int64)
    if GATHER:
        read = tl.load(row_ptr + read, mask=rows < end, other=0)
    x = tl.load(x_ptr + read[:, None] * stride_xr + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    bits = scale_bits(tl.max(tl.abs(x), axis=0))
    q = (x * inverse(bits)[None, :]).to(q_ptr.dtype.element_ty)
    target = tile * BLOCK + tl.arange(0, BLOCK)
    q_ptrs = q_ptr + columns[None, :].to(tl.int64) * padded + target[:, None]
    # Padding is stored too: every element of q is written.
    tl.store(q_ptrs, q, mask=columns[None, :] < K)
    scale_ptrs = scale_ptr + tile.to(tl.int64) * K + columns
    tl.store(scale_ptrs, bits.to(tl.float32, bitcast=True), mask=columns < K)


@jit
def round_weight(w_ptr, q_ptr, qt_ptr, scale_ptr, K, N, stride_wl, stride_wk, stride_wn, BLOCK: tl.constexpr):
    """w [L, K, N] -> q [L, K, N], transposed [L, N, K], scale [L, K / BLOCK, N / BLOCK]: one for BLOCK x BLOCK.
    The grid is (K / BLOCK, N / BLOCK, L)."""
    ks = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(2).to(tl.int64)
    mask = (ks[:, None] < K) & (ns[None, :] < N)
    wide_k, wide_n = ks[:, None].to(tl.int64), ns[None, :].to(tl.int64)
    w = tl.load(w_ptr + expert * stride_wl + wide_k * stride_wk + wide_n * stride_wn, mask=mask, other=0.0)
    w = w.to(tl.float32)
    bits = scale_bits(tl.max(tl.max(tl.abs(w), axis=1), axis=0))
    q = (w * inverse(bits)).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + expert * K * N + wide_k * N + wide_n, q, mask=mask)
    tl.store(qt_ptr + expert * K * N + wide_n * K + wide_k, q, mask=mask)
    blocks_k, blocks_n = tl.cdiv(K, BLOCK), tl.cdiv(N, BLOCK)
    place = expert * blocks_k * blocks_n + tl.program_id(0) * blocks_n + tl.program_id(1)
    tl.store(scale_ptr + place, bits.to(tl.float32, bitcast=True))
