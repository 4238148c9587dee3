"""Tokens to the rows that experts compute on, and the experts' answers back to their tokens, on one rank.

Legend: T tokens, D hidden, E experts, K choices per token, R routed rows grouped by expert, X choices.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import te
from ops.operation import Implementation, Operation
from ops.run_context import RunContext


def by_expert(expert_X: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order that sorts by expert and then by place, choices of each expert [E]); expert E, which does not exist, comes
    last and is not counted."""
    sorted_X, order = expert_X.sort(stable=True)
    ends_E = torch.searchsorted(sorted_X, torch.arange(num_experts, device=sorted_X.device), right=True)
    return order, ends_E.diff(prepend=ends_E.new_zeros(1))


FEW_CHOICES = 1024
"""Up to which numpy's two calls take less time than PyTorch's five take before they begin."""


def by_expert_on_host(expert_X: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """by_expert, whose counts the host reads."""
    if expert_X.device.type == "cpu" and len(expert_X) <= FEW_CHOICES and not torch.is_grad_enabled():
        expert = expert_X.numpy()
        counts = np.bincount(expert, minlength=num_experts + 1)[:num_experts]
        return torch.from_numpy(expert.argsort(kind="stable")), counts.tolist()
    order, counts_E = by_expert(expert_X, num_experts)
    return order, counts_E.tolist()


def tokens_of(choice_R: Tensor, top_k: int) -> Tensor:
    """[R]: whose choices these are."""
    return choice_R if top_k == 1 else choice_R // top_k


def permute(x_TD: Tensor, choice_R: Tensor, top_k: int, padded: bool) -> Tensor:
    """[R, D]: the token of each choice; zeros for choice T * K."""
    x_TD = F.pad(x_TD, (0, 0, 0, 1)) if padded else x_TD
    # index_select, not indexing: its gradient adds rows in parallel, that of indexing one by one.
    return x_TD.index_select(0, tokens_of(choice_R, top_k))


def unpermute(y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor, padded: bool) -> Tensor:
    """[T, D]: every row times its gate, added to its token."""
    tokens, top_k = gates_TK.shape
    gates = F.pad(gates_TK.flatten(), (0, 1)) if padded else gates_TK.flatten()
    # In the experts' precision, as in Switch (section 2.4): fp32 stays within the router.
    weighted_RD = y_RD * gates.index_select(0, choice_R).unsqueeze(1).to(y_RD.dtype)
    out_TD = y_RD.new_zeros((tokens + padded, y_RD.shape[1]))
    out_TD.index_add_(0, tokens_of(choice_R, top_k), weighted_RD)
    return out_TD[:tokens] if padded else out_TD


def permute_backward(rows_RD: Tensor, choice_R: Tensor, top_k: int, tokens: int) -> Tensor:
    """[T, D]: every row added to its token, the gradient of `permute` without padding; autograd does not follow."""
    return rows_RD.new_zeros((tokens, rows_RD.shape[1])).index_add_(0, tokens_of(choice_R, top_k), rows_RD)


class Permutation(Protocol):
    """`permute`, `permute_backward` and `unpermute`, by whatever means."""

    def permute(self, x_TD: Tensor, choice_R: Tensor, top_k: int, padded: bool) -> Tensor: ...

    def permute_backward(self, rows_RD: Tensor, choice_R: Tensor, top_k: int, tokens: int) -> Tensor: ...

    def unpermute(self, y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor, padded: bool) -> Tensor: ...


class TorchPermutation:
    """The functions above."""

    permute, unpermute = staticmethod(permute), staticmethod(unpermute)
    permute_backward = staticmethod(permute_backward)


TORCH_PERMUTATION = TorchPermutation()


@dataclass(frozen=True)
class PermuteIndices:
    """Which tokens the experts' rows are: row r is token choice_R[r] // top_k, and no choice is there twice."""

    choice_R: Tensor
    top_k: int
    permutation: Permutation = TORCH_PERMUTATION

    def token_R(self) -> Tensor:
        return tokens_of(self.choice_R, self.top_k)

    def permute_backward(self, rows_RD: Tensor, tokens: int) -> Tensor:
        """[T, D]: every row added to its token."""
        return self.permutation.permute_backward(rows_RD, self.choice_R, self.top_k, tokens)


@dataclass(frozen=True)
class PermutedTokens:
    """Rows for the experts before they are gathered: kernels that read a row from where it lies need no copy of all."""

    x_TD: Tensor
    indices: PermuteIndices
    padded: bool = False
    """A row may be choice T * K, which is a row of zeros; then they have to be gathered."""

    def __len__(self) -> int:
        return len(self.indices.choice_R)

    def permute(self) -> Tensor:
        return self.indices.permutation.permute(self.x_TD, self.indices.choice_R, self.indices.top_k, self.padded)


def _te(context: RunContext) -> Permutation:
    from ops.te_permute import TePermutation

    return te.load(TePermutation)


def _no_te_rows(context: RunContext) -> str | None:
    if context.model.moe.pad_to_capacity:
        return "has no rows of padding (model.moe.pad_to_capacity)"
    size = context.model.hidden_size
    return f"needs rows of a multiple of 16 bytes; {size} values in bf16 are not" if size % 8 else None


def _trial(permutation: Permutation, context: RunContext) -> list[Tensor]:
    """Nine tokens, of whose choices three in four are there, and one row that is none."""
    tokens, top_k, hidden = 9, context.model.moe.top_k, context.model.hidden_size
    drawn = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(0))[: 3 * tokens * top_k // 4]
    choice_R = torch.cat([drawn[:4], torch.tensor([tokens * top_k]), drawn[4:]]).to(context.device)
    leaves = [context.randn(tokens, hidden), context.randn(tokens, top_k, seed=1, dtype=torch.float32)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    taken_RD = permutation.permute(leaves[0], choice_R, top_k, True)
    out_TD = permutation.unpermute(taken_RD * 2, choice_R, leaves[1], True)
    gradients = torch.autograd.grad(out_TD, leaves, context.randn(tokens, hidden, seed=2))
    added_TD = permutation.permute_backward(
        context.randn(len(drawn), hidden, seed=3), drawn.to(context.device), top_k, tokens
    )
    return [taken_RD.detach(), out_TD.detach(), *gradients, added_TD]


PERMUTATION: Operation[Permutation] = Operation(
    field="permutation",
    name="permutation",
    reference=lambda context: Implementation("torch", lambda context: TORCH_PERMUTATION, "index_select and index_add"),
    implementations=[
        Implementation("Triton", "ops.triton.permute:PERMUTATION", device="cuda"),
        Implementation(
            te.NAME,
            _te,
            device="cuda",
            dtypes=(torch.bfloat16,),
            is_supported=te.is_meant,
            unsupported_reason=_no_te_rows,
        ),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    is_used=lambda context: bool(context.model.moe.num_experts),
)
