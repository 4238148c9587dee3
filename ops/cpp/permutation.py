"""Rows of tokens gathered, added up and weighed in C++ (permutation.cpp), in bf16.

Legend: T tokens, D hidden, K choices per token, R routed rows.
"""

from torch import Tensor

from ops.cpp.operators import NAMESPACE
from ops.fused_permute import KernelPermutation


class _Kernels:
    """For ops.fused_permute."""

    def gather(self, source_TD: Tensor, choice_R: Tensor, gates_TK: Tensor | None, top_k: int) -> Tensor:
        return NAMESPACE.gather_rows.default(source_TD, choice_R, gates_TK, top_k)

    def add(self, rows_RD: Tensor, slot: Tensor, gates_TK: Tensor | None, tokens: int, top_k: int) -> Tensor:
        return NAMESPACE.add_rows.default(rows_RD, slot, gates_TK, tokens, top_k)

    def gate_gradient(self, rows_RD: Tensor, slot: Tensor, grad_TD: Tensor, gates_TK: Tensor) -> Tensor:
        return NAMESPACE.gate_gradient.default(rows_RD, slot, grad_TD, gates_TK.shape[1])


PERMUTATION = KernelPermutation(_Kernels())
