"""Which row is which: what the dispatchers have in common.

Legend: T tokens of this rank, D hidden, E experts, K choices per token, R routed rows, X choices, N tokens of the ranks
that rows come from.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import Assignments
from ops.permute import by_expert
from parallel.async_collectives import AsyncCollective


def fill_slots(expert_X: Tensor, num_experts: int, slots: int) -> Tensor:
    """[E * slots]: which choice each slot holds, an expert's in order from its first slot on; X, which does not exist,
    where a slot is empty. Choices of expert E get no slot."""
    order, counts_E = by_expert(expert_X, num_experts)
    sorted_X = expert_X[order]
    first = F.pad(counts_E.cumsum(0), (1, 0))  # of each expert, and of expert E
    slot_X = sorted_X * slots + torch.arange(len(order), device=order.device) - first[sorted_X]
    slot_X = torch.where(sorted_X < num_experts, slot_X, num_experts * slots)
    choice = torch.full((num_experts * slots + 1,), len(order), device=order.device)
    return choice.scatter(0, slot_X, order)[:-1]


def take_names(names_TK: Tensor | None, choice_R: Tensor) -> Tensor | None:
    return None if names_TK is None else F.pad(names_TK.flatten(), (0, 1))[choice_R]


def masked_experts(assignments: Assignments, num_experts: int) -> Tensor:
    """[T * K]: the chosen experts, and E where the choice was dropped."""
    if assignments.keep_TK is None:
        return assignments.experts_TK.flatten()
    return torch.where(assignments.keep_TK, assignments.experts_TK, num_experts).flatten()


@dataclass(frozen=True)
class Travelling:
    """Rows on their way, and what is known of them beforehand."""

    handle: Tensor
    collective: AsyncCollective
    choice_R: Tensor
    """Which of the T * K choices each row was that left this rank; of the N * K for an all-gather."""
    assignments: Assignments
    padded: bool
    counts: list[int]
