"""Tokens to rows and back in Triton (ops/fused_permute.py).

Legend: T tokens, D hidden, K choices per token, R routed rows.
"""

import torch
import triton.language as tl
from torch import Tensor

from ops.fused_permute import KernelPermutation
from ops.triton.jit import jit


@jit(do_not_specialize=["T"])
def gather_rows(
    source_ptr, choice_ptr, gates_ptr, out_ptr, T, D, K: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [R, D]: the source [T, D] of each row's choice, times its gate with GATED; zeros for choice T * K. The grid
    is (R, D / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(choice_ptr + row).to(tl.int64)
    there = choice < T * K
    # Without a choice no column is read: a mask of one number and one of many do not combine.
    x = tl.load(source_ptr + choice // K * D + columns, mask=columns < tl.where(there, D, 0), other=0.0)
    if GATED:
        gate = tl.load(gates_ptr + choice, mask=there, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * gate).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + columns, x, mask=columns < D)


@jit
def add_rows(
    rows_ptr, slot_ptr, gates_ptr, out_ptr, D, K: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [T, D]: the sum of the rows of each token's K choices, with GATED each times its gate; slot [T, K]: which row
    a choice has, -1 for none. The grid is (T, D / BLOCK)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(K):
        slot = tl.load(slot_ptr + token * K + k).to(tl.int64)
        x = tl.load(rows_ptr + slot * D + columns, mask=columns < tl.where(slot >= 0, D, 0), other=0.0).to(tl.float32)
        if GATED:
            x = x * tl.load(gates_ptr + token * K + k).to(tl.float32)
        total += x
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=columns < D)


@jit
def gate_gradient(rows_ptr, slot_ptr, grad_ptr, out_ptr, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, K]: the product of a choice's row with its token's gradient [T, D]; 0 for a choice without a row. The
    grid is (T, K)."""
    token, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + token * K + k).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(rows_ptr + slot * D + columns, mask=columns < tl.where(slot >= 0, D, 0), other=0.0).to(tl.float32)
        total += x * tl.load(grad_ptr + token * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * K + k, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty))


BLOCK = 1024


class _Kernels:
    """For ops.fused_permute."""

    def gather(self, source_TD: Tensor, choice_R: Tensor, gates_TK: Tensor | None, top_k: int) -> Tensor:
        (tokens, hidden), rows = source_TD.shape, len(choice_R)
        out_RD = source_TD.new_empty((rows, hidden))
        if rows:
            gather_rows[(rows, -(-hidden // BLOCK))](
                source_TD, choice_R, source_TD if gates_TK is None else gates_TK, out_RD, tokens, hidden,
                K=top_k, GATED=gates_TK is not None, BLOCK=BLOCK,
            )  # fmt: skip
        return out_RD

    def add(self, rows_RD: Tensor, slot: Tensor, gates_TK: Tensor | None, tokens: int, top_k: int) -> Tensor:
        out_TD = rows_RD.new_empty((tokens, rows_RD.shape[1]))
        add_rows[(tokens, -(-rows_RD.shape[1] // BLOCK))](
            rows_RD, slot, rows_RD if gates_TK is None else gates_TK, out_TD, rows_RD.shape[1],
            K=top_k, GATED=gates_TK is not None, BLOCK=BLOCK,
        )  # fmt: skip
        return out_TD

    def gate_gradient(self, rows_RD: Tensor, slot: Tensor, grad_TD: Tensor, gates_TK: Tensor) -> Tensor:
        (tokens, top_k), dgates_TK = gates_TK.shape, torch.empty_like(gates_TK)
        gate_gradient[(tokens, top_k)](rows_RD, slot, grad_TD, dgates_TK, rows_RD.shape[1], K=top_k, BLOCK=BLOCK)
        return dgates_TK


PERMUTATION = KernelPermutation(_Kernels())
