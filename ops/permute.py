"""Tokens to the rows that experts compute on, and the experts' answers back to their tokens, on one rank.

Legend: T tokens, D hidden, K choices per token, R routed rows grouped by expert.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import build as native
from ops.registry import Candidate, Choice, select


def tokens_of(choice_R: Tensor, top_k: int) -> Tensor:
    """[R]: whose choices these are."""
    return choice_R if top_k == 1 else choice_R // top_k


def take(x_TD: Tensor, choice_R: Tensor, top_k: int, padded: bool) -> Tensor:
    """[R, D]: the token of each choice; zeros for choice T * K."""
    x_TD = F.pad(x_TD, (0, 0, 0, 1)) if padded else x_TD
    # index_select, not indexing: its gradient adds rows in parallel, that of indexing one by one.
    return x_TD.index_select(0, tokens_of(choice_R, top_k))


def weighted_sum(y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor, padded: bool) -> Tensor:
    """[T, D]: every row times its gate, added to its token."""
    tokens, top_k = gates_TK.shape
    gates = F.pad(gates_TK.flatten(), (0, 1)) if padded else gates_TK.flatten()
    # In the experts' precision, as in Switch (section 2.4): fp32 stays within the router.
    weighted_RD = y_RD * gates[choice_R, None].to(y_RD.dtype)
    out_TD = y_RD.new_zeros((tokens + padded, y_RD.shape[1]))
    return out_TD.index_add(0, tokens_of(choice_R, top_k), weighted_RD)[:tokens]


def add(rows_RD: Tensor, choice_R: Tensor, top_k: int, tokens: int) -> Tensor:
    """[T, D]: every row added to its token, the gradient of `take` without padding; autograd does not follow."""
    return rows_RD.new_zeros((tokens, rows_RD.shape[1])).index_add_(0, tokens_of(choice_R, top_k), rows_RD)


class Rows(Protocol):
    """`take`, `add` and `weighted_sum`, by whatever means."""

    def take(self, x_TD: Tensor, choice_R: Tensor, top_k: int, padded: bool) -> Tensor: ...

    def add(self, rows_RD: Tensor, choice_R: Tensor, top_k: int, tokens: int) -> Tensor: ...

    def weighted_sum(self, y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor, padded: bool) -> Tensor: ...


class PlainRows:
    """The functions above."""

    take, add, weighted_sum = staticmethod(take), staticmethod(add), staticmethod(weighted_sum)


PLAIN_ROWS = PlainRows()


@dataclass(frozen=True)
class Origin:
    """Which tokens the experts' rows are: row r is token choice_R[r] // top_k, and no choice is there twice."""

    choice_R: Tensor
    top_k: int
    by: Rows = PLAIN_ROWS

    def token_R(self) -> Tensor:
        return tokens_of(self.choice_R, self.top_k)

    def add(self, rows_RD: Tensor, tokens: int) -> Tensor:
        """[T, D]: every row added to its token."""
        return self.by.add(rows_RD, self.choice_R, self.top_k, tokens)


@dataclass(frozen=True)
class Routed:
    """Rows for the experts before they are gathered: kernels that read a row from where it lies need no copy of all."""

    x_TD: Tensor
    origin: Origin
    padded: bool = False
    """A row may be choice T * K, which is a row of zeros; then they have to be gathered."""

    def __len__(self) -> int:
        return len(self.origin.choice_R)

    def gather(self) -> Tensor:
        return self.origin.by.take(self.x_TD, self.origin.choice_R, self.origin.top_k, self.padded)


def _triton_rows() -> Rows:
    from ops.triton.permute import ROWS

    return ROWS


def _native_rows() -> Rows:
    from ops.cpp.permutation import ROWS

    return ROWS


def choose_rows(device: torch.device, dtype: torch.dtype) -> tuple[Rows, Choice]:
    """Triton's on a GPU, or ours in C++ on a CPU that it is made for, where they equal the plain ones."""

    def run(rows: Rows) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x_TD, gates_TK, grad_TD = (torch.randn(*s, generator=generator) for s in ((9, 80), (9, 2), (9, 80)))
        leaves = [x_TD.to(device, dtype).requires_grad_(), gates_TK.to(device).requires_grad_()]
        choice_R = torch.tensor([0, 17, 4, 5, 18, 9, 2, 16], device=device)  # 18 is none
        taken_RD = rows.take(leaves[0], choice_R, 2, True)
        out_TD = rows.weighted_sum(taken_RD * 2, choice_R, leaves[1], True)
        return [taken_RD, out_TD, *torch.autograd.grad(out_TD, leaves, grad_TD.to(device, dtype))]

    part, plain = "permutation", ("torch", PLAIN_ROWS)
    if device.type == "cuda":
        faster = Candidate("Triton", _triton_rows)
    elif native.made_for(device, dtype):
        faster = native.candidate(_native_rows)
    else:
        return plain[1], Choice(part, plain[0], "index_select and index_add")
    return select(part, [faster], plain, run, 1e-5 if dtype == torch.float32 else 2e-2)
