"""Grouped products in Triton: every row times its own expert's weight, and the gradient of the weights.

Legend: R rows grouped by expert, K inner and N outer dimension of the forward product, L experts. Scales belong to FP8
operands (ops/fp8_numerics.py); a stride of 0 spreads one scale over an axis.
"""

import triton.language as tl

from ops.triton.jit import jit


@jit(do_not_specialize=["num_row_tiles"])
def grouped_product(
    x_ptr, w_ptr, y_ptr, x_scale_ptr, w_scale_ptr, row_ptr, tiles_ptr, num_row_tiles, N, K,
    stride_xr, stride_wl, stride_wk, stride_wn, stride_yr,
    stride_x_scale_r, stride_x_scale_k, stride_w_scale_l, stride_w_scale_k, stride_w_scale_n,
    SCALES: tl.constexpr, GATHER: tl.constexpr, DESCRIPTORS: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y [R, N] = x [R, K] @ w [L, K, N] of the row's expert, or with GATHER x [T, K] of which row r is number row[r]; a
    tile's rows are looked up once, before the loop. With DESCRIPTORS the copy engine fetches tiles by descriptors of x
    [R, K], and of w flattened to [L * K, N] or, with COLUMNS_FIRST, where K is contiguous, to [L * N, K].

    tiles, int32 [row tiles, 3]: expert, first row, end of the expert's rows. SCALES: "none" for bf16 operands; for FP8
    "blocks", scales [R, K / BK] and [L, K / BK, N / BN], or "rows", one for all of the inner dimension, [R, 1] and
    [L, 1, N]. An FP8 tensor core adds up with fewer bits than fp32, so the sum over each BK goes into a sum in fp32
    (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Persistent: each program takes every num_programs-th tile."""
    num_column_tiles = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, begin, end, column_tile = _locate(tile, tiles_ptr, num_row_tiles, num_column_tiles, GROUP)
        rows = begin + tl.arange(0, BM)
        # Rows past the end read the last row again, which needs no mask in the loop, and are not stored.
        read = tl.minimum(rows, end - 1).to(tl.int64)
        if GATHER:
            read = tl.load(row_ptr + read)
        column = column_tile * BN
        columns, inner = column + tl.arange(0, BN), tl.arange(0, BK)
        if not DESCRIPTORS:
            x_ptrs = x_ptr + read[:, None] * stride_xr + inner[None, :]
            w_ptrs = w_ptr + expert * stride_wl + inner[:, None] * stride_wk + columns[None, :] * stride_wn
        w_scale_ptrs = w_scale_ptr + expert * stride_w_scale_l
        if SCALES == "blocks":
            w_scale_ptrs += column // BN * stride_w_scale_n
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            if DESCRIPTORS:
                # What lies past the expert's rows or columns belongs to the next one and is not stored.
                x = x_ptr.load([begin, k * BK])
                if COLUMNS_FIRST:
                    w = w_ptr.load([expert.to(tl.int32) * N + column, k * BK]).T
                else:
                    w = w_ptr.load([expert.to(tl.int32) * K + k * BK, column])
            else:  # DESCRIPTORS is a constant: what is bound above is bound here
                left = K - k * BK
                x = tl.load(x_ptrs, mask=inner[None, :] < left, other=0.0)  # pyright: ignore[reportPossiblyUnboundVariable]
                w = tl.load(w_ptrs, mask=(inner[:, None] < left) & (columns[None, :] < N), other=0.0)  # pyright: ignore[reportPossiblyUnboundVariable]
                x_ptrs += BK  # pyright: ignore[reportPossiblyUnboundVariable]
                w_ptrs += BK * stride_wk  # pyright: ignore[reportPossiblyUnboundVariable]
            if SCALES == "none":
                acc = tl.dot(x, w, acc)
            elif SCALES == "rows":
                acc += tl.dot(x, w)
            else:
                x_scale = tl.load(x_scale_ptr + read * stride_x_scale_r + k * stride_x_scale_k)
                w_scale = tl.load(w_scale_ptrs + k * stride_w_scale_k)
                acc += tl.dot(x, w) * (x_scale * w_scale)[:, None]
        if SCALES == "rows":
            x_scale = tl.load(x_scale_ptr + read * stride_x_scale_r)
            w_scale = tl.load(w_scale_ptrs + columns * stride_w_scale_n, mask=columns < N, other=0.0)
            acc = acc * x_scale[:, None] * w_scale[None, :]
        _store(y_ptr, acc, rows, columns, end, N, stride_yr)


@jit
def _locate(tile, tiles_ptr, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """A tile's expert, first row, end of the expert's rows, and column tile. GROUP row tiles, mostly of one expert,
    take turns at a column tile, so that its part of the weight is read once from memory and then from the second-level
    cache."""
    first = tile // (GROUP * num_column_tiles) * GROUP
    group = tl.minimum(num_row_tiles - first, GROUP)
    within = tile % (GROUP * num_column_tiles)
    entry = tiles_ptr + 3 * (first + within % group)
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2), within // group


@jit
def _store(y_ptr, y, rows, columns, end, N, stride_yr):
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_yr + columns[None, :]
    stored = (rows[:, None] < end) & (columns[None, :] < N)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=stored)


@jit
def grouped_weight_gradient(
    x_ptr, dy_ptr, dw_ptr, x_scale_ptr, dy_scale_ptr, starts_ptr, num_experts, K, N,
    stride_xr, stride_xk, stride_dyr, stride_dyn,
    FP8: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw [L, K, N], contiguous: x.T @ dy of x [R, K] and dy [R, N] over the rows of each expert, or with ADD that is
    added; zeros, or nothing, where there is no row. starts, int32 [L + 1]: first row of each expert. FP8 operands begin
    every expert at a multiple of BR rows and end it with rows of zeros; scales are [R / BR, K] and [R / BR, N].

    GROUP tiles along K take turns at one along N, so that both operands come from the second-level cache."""
    tiles_k, tiles_n = tl.cdiv(K, BM), tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), num_experts * tiles_k * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_k * tiles_n)
        within = tile % (tiles_k * tiles_n)
        first = within // (GROUP * tiles_n) * GROUP
        group = tl.minimum(tiles_k - first, GROUP)
        within = within % (GROUP * tiles_n)
        begin, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
        first_k, first_n = (first + within % group) * BM, within // group * BN
        ks, ns = first_k + tl.arange(0, BM), first_n + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        if FP8:
            begin = tl.multiple_of(begin, BR)  # rows are the contiguous axis: this is what makes wide loads of them
        rows = begin + tl.arange(0, BR)
        x_ptrs = x_ptr + ks[:, None].to(tl.int64) * stride_xk + rows[None, :].to(tl.int64) * stride_xr
        dy_ptrs = dy_ptr + rows[:, None].to(tl.int64) * stride_dyr + ns[None, :].to(tl.int64) * stride_dyn
        for row in range(begin, end, BR):
            if FP8:
                x = tl.load(x_ptrs, mask=ks[:, None] < K, other=0.0)
                dy = tl.load(dy_ptrs, mask=ns[None, :] < N, other=0.0)
                x_scale = tl.load(x_scale_ptr + row // BR * K + ks, mask=ks < K, other=0.0)
                dy_scale = tl.load(dy_scale_ptr + row // BR * N + ns, mask=ns < N, other=0.0)
                acc += tl.dot(x, dy) * x_scale[:, None] * dy_scale[None, :]
            else:
                here = row + tl.arange(0, BR) < end
                x = tl.load(x_ptrs, mask=(ks[:, None] < K) & here[None, :], other=0.0)
                dy = tl.load(dy_ptrs, mask=here[:, None] & (ns[None, :] < N), other=0.0)
                acc = tl.dot(x, dy, acc)
            x_ptrs += BR * stride_xr
            dy_ptrs += BR * stride_dyr
        # One half after the other: the old values of all of it would not fit beside the sums.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        dw_ptrs = dw_ptr + expert.to(tl.int64) * K * N
        _write(dw_ptrs, left, first_k, first_n, K, N, ADD, BM, BN // 2)
        _write(dw_ptrs, right, first_k, first_n + BN // 2, K, N, ADD, BM, BN // 2)


@jit
def _write(dw_ptr, acc, first_k, first_n, K, N, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    ks, ns = first_k + tl.arange(0, BM), first_n + tl.arange(0, BN)
    ptrs = dw_ptr + ks[:, None].to(tl.int64) * N + ns[None, :]
    stored = (ks[:, None] < K) & (ns[None, :] < N)
    if ADD:
        acc += tl.load(ptrs, mask=stored, other=0.0)
    tl.store(ptrs, acc.to(dw_ptr.dtype.element_ty), mask=stored)
