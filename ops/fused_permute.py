"""Tokens to rows and back (ops/permute.py) on kernels that read every row once and write it once. Each token adds up
its own rows in fp32 and in their order, so sums are the same every time.

Legend: T tokens, D hidden, K choices per token, R routed rows.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Kernels(Protocol):
    """Operands are contiguous; slot [T * K] says which row a choice has, -1 for none."""

    def gather(self, source_TD: Tensor, choice_R: Tensor, gates_TK: Tensor | None, top_k: int) -> Tensor:
        """[R, D]: the source of each row's choice, times its gate if there are gates; zeros for choice T * K."""
        ...

    def add(self, rows_RD: Tensor, slot: Tensor, gates_TK: Tensor | None, tokens: int, top_k: int) -> Tensor:
        """[T, D]: the sum of the rows of each token's choices, times their gates if there are any."""
        ...

    def gate_gradient(self, rows_RD: Tensor, slot: Tensor, grad_TD: Tensor, gates_TK: Tensor) -> Tensor:
        """[T, K], as the gates are: the product of each choice's row with its token's gradient."""
        ...


def slots_of(choice_R: Tensor, choices: int) -> Tensor:
    """int64 [choices]: which row each choice has, -1 for none. Several rows may have choice number `choices`: none."""
    slot = torch.full((choices + 1,), -1, dtype=torch.int64, device=choice_R.device)
    return slot.scatter_(0, choice_R, torch.arange(len(choice_R), device=choice_R.device))[:-1]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, permutation: "KernelPermutation", x_TD: Tensor, choice_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(choice_R)
        ctx.permutation, ctx.sizes = permutation, (top_k, len(x_TD))
        return permutation.kernels.gather(x_TD.contiguous(), choice_R.contiguous(), None, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.permutation.permute_backward(grad_RD, *ctx.saved_tensors, *ctx.sizes), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor) -> Tensor:
        y_RD, gates_TK, choice_R = y_RD.contiguous(), gates_TK.contiguous(), choice_R.contiguous()
        slot = slots_of(choice_R, gates_TK.numel())
        ctx.kernels = kernels
        ctx.save_for_backward(y_RD, choice_R, gates_TK, slot)
        return kernels.add(y_RD, slot, gates_TK, *gates_TK.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[None, Tensor, None, Tensor]:
        y_RD, choice_R, gates_TK, slot = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        dgates_TK = ctx.kernels.gate_gradient(y_RD, slot, grad_TD, gates_TK)
        return None, ctx.kernels.gather(grad_TD, choice_R, gates_TK, gates_TK.shape[1]), None, dgates_TK


@dataclass(frozen=True)
class KernelPermutation:
    """ops.permute.Permutation."""

    kernels: Kernels

    def permute(self, x_TD: Tensor, choice_R: Tensor, top_k: int, padded: bool) -> Tensor:
        return _Permute.apply(self, x_TD, choice_R, top_k)

    def permute_backward(self, rows_RD: Tensor, choice_R: Tensor, top_k: int, tokens: int) -> Tensor:
        return self.kernels.add(rows_RD.contiguous(), slots_of(choice_R, tokens * top_k), None, tokens, top_k)

    def unpermute(self, y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor, padded: bool) -> Tensor:
        return _WeightedSum.apply(self.kernels, y_RD, choice_R, gates_TK)
