"""What brings rows to the ranks that hold their experts: its interface, which moe/dispatcher.py implements.

Legend: T tokens of this rank, D hidden, K choices per token, R routed rows.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ops.permute import Permutation, PermutedTokens
from parallel.process_groups import Groups


@dataclass(frozen=True)
class Assignments:
    """What the router decided for T tokens, [T, K] each."""

    experts_TK: Tensor
    gates_TK: Tensor
    keep_TK: Tensor | None
    """False where the choice is dropped; None: none is."""
    names_TK: Tensor | None = None
    """int64, a name for every choice that travels with its row. None: rows stay nameless."""


def with_gated_inputs(x_TD: Tensor, assignments: Assignments) -> tuple[Tensor, Assignments]:
    """Each token times each of its gates [T * K, D], and their assignments, one each, whose gates are 1."""
    of_one, gates_TK = (lambda t_TK: t_TK.reshape(-1, 1)), assignments.gates_TK
    # In the experts' precision, as the gates of outputs (ops.permute.unpermute).
    gated_TKD = x_TD.unsqueeze(1) * gates_TK.unsqueeze(2).to(x_TD.dtype)
    names = None if assignments.names_TK is None else of_one(assignments.names_TK)
    ones = torch.ones_like(of_one(gates_TK), requires_grad=False)
    kept = None if assignments.keep_TK is None else of_one(assignments.keep_TK)
    return gated_TKD.flatten(0, 1), Assignments(of_one(assignments.experts_TK), ones, kept, names)


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts."""

    rows: PermutedTokens
    """Grouped by expert."""
    counts: list[int]
    """Rows of each of this rank's experts."""
    names_R: Tensor | None
    """Of the rows; any number for a row of zeros."""
    way_back: Any
    """What the dispatcher needs to combine."""


class Dispatcher(Protocol):
    """How rows get to their experts. Between `start` and `finish` of a layer there is no other `start`."""

    def start(self, x_TD: Tensor, assignments: Assignments, slots: int | None = None) -> Any:
        """Sends the rows of the kept assignments. slots: rows of each expert from each rank; None: those there are."""
        ...

    def finish(self, started: Any) -> Dispatched:
        """Waits for the rows that come to this rank."""
        ...

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """[T, D]: the sum over each token's kept assignments of gate * expert output; zero where all were dropped.

        Args:
            y_RD: the experts' answers to the rows, partial sums where the experts are sharded over etp.
        """
        ...


class DispatcherFactory(Protocol):
    """Makes the dispatcher of a layer."""

    def __call__(self, num_experts: int, hidden_size: int, groups: Groups, permutation: Permutation) -> Dispatcher: ...
