"""Rows of tokens gathered, added up and weighed in C++ (permutation.cpp), in bf16.

Legend: T tokens, D hidden, K choices per token, R routed rows.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from ops.cpp.build import data_of, library, threads
from ops.fused_permute import KernelPermutation


def _check(rows_XD: Tensor, numbers: Tensor, gates_TK: Tensor | None) -> None:
    assert rows_XD.device.type == "cpu" and rows_XD.dtype == torch.bfloat16 and numbers.dtype == torch.int64
    assert gates_TK is None or gates_TK.dtype == torch.float32


class _Kernels:
    """For ops.fused_permute."""

    def gather(self, source_TD: Tensor, choice_R: Tensor, gates_TK: Tensor | None, top_k: int) -> Tensor:
        _check(source_TD, choice_R, gates_TK)
        tokens, hidden = source_TD.shape
        out_RD = source_TD.new_empty((len(choice_R), hidden))
        library().switchyard_gather_rows(
            *map(c_int64, (len(choice_R), tokens, top_k, hidden)),
            *map(data_of, (source_TD, choice_R, gates_TK, out_RD)), threads(),
        )  # fmt: skip
        return out_RD

    def add(self, rows_RD: Tensor, slot: Tensor, gates_TK: Tensor | None, tokens: int, top_k: int) -> Tensor:
        _check(rows_RD, slot, gates_TK)
        out_TD = rows_RD.new_empty((tokens, rows_RD.shape[1]))
        library().switchyard_add_rows(
            *map(c_int64, (tokens, top_k, rows_RD.shape[1])),
            *map(data_of, (rows_RD, slot, gates_TK, out_TD)), threads(),
        )  # fmt: skip
        return out_TD

    def gate_gradient(self, rows_RD: Tensor, slot: Tensor, grad_TD: Tensor, gates_TK: Tensor) -> Tensor:
        _check(rows_RD, slot, gates_TK)
        assert grad_TD.dtype == torch.bfloat16 and grad_TD.shape == (len(gates_TK), rows_RD.shape[1])
        dgates_TK = torch.empty_like(gates_TK)
        library().switchyard_gate_gradient(
            *map(c_int64, (*gates_TK.shape, rows_RD.shape[1])),
            *map(data_of, (rows_RD, slot, grad_TD, dgates_TK)), threads(),
        )  # fmt: skip
        return dgates_TK


PERMUTATION = KernelPermutation(_Kernels())
