"""Moves tokens between context-parallel ranks, from one stretch of the sequence on each to the order of Megatron-LM's
batches and of TransformerEngine, and back: every document is in 2 n parts of one size, of which rank i of n has i and
2 n - 1 - i, so that the ranks have as much to do as each other.

Legend: S sequence (this rank's slice), B batch, H heads, N width of a head, T tokens of a rank in the other order.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ops.attention_pieces import Piece
from parallel.async_collectives import async_all_to_all, run_collective

Lengths = tuple[tuple[int, ...], ...]
"""Of the documents in each sequence of a batch."""


@dataclass(frozen=True)
class Exchange:
    """Of a batch."""

    padded: tuple[int, ...]
    """The lengths of all documents, one sequence after the other, with zeros at the end of each up to a multiple of
    2 n. Causal attention needs no mask for them: tokens do not see what comes later."""
    sent_R: Tensor
    """int64: which of this rank's S * B tokens it sends, one receiver's after the other."""
    to: list[int]
    """How many to each rank."""
    placed_R: Tensor
    """int64: where among its T tokens this rank puts what it receives."""
    come: list[int]
    """How many from each rank."""

    def there(self, x_SBHN: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[T, H, N]"""
        sent = x_SBHN.flatten(0, 1).index_select(0, self.sent_R)
        received = run_collective(sent, async_all_to_all(self.to, self.come, group))
        out = received.new_zeros((sum(self.padded) // group.size(), *received.shape[1:]))
        return out.index_copy(0, self.placed_R, received)

    def back(self, x_THN: Tensor, like_SBHN: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[S, B, H, N], as long as another one."""
        sent = x_THN.index_select(0, self.placed_R)
        received = run_collective(sent, async_all_to_all(self.come, self.to, group))
        return torch.empty_like(received).index_copy(0, self.sent_R, received).unflatten(0, like_SBHN.shape[:2])


def documents_of(pieces: list[Piece] | None, sequence: int, batch: int) -> Lengths:
    """The documents, or chunks, of a batch that only see themselves.

    Args:
        pieces: of whole sequences (ops.attention_pieces); None: each is a document.
    """
    if pieces is None:
        return ((sequence,),) * batch
    rows = [tuple(segment.queries for segment in row) for row in pieces[0].rows]
    return tuple(rows if len(rows) == batch else rows * batch)


@lru_cache(maxsize=8)
def exchange(documents: Lengths, rank: int, ranks: int, device: torch.device) -> Exchange:
    """Computed once for all layers of a micro-batch."""
    size, batch = sum(documents[0]) // ranks, len(documents)
    padded: list[int] = []
    tokens: list[list[Tensor]] = [[] for _ in range(ranks)]
    """Of each rank: its tokens in the other order, as s * B + b of the whole sequence; -1: padding."""
    for row, lengths in enumerate(documents):
        for start, end in pairwise(accumulate(lengths, initial=0)):
            part = -(-(end - start) // (2 * ranks))
            padded.append(2 * ranks * part)
            place = torch.arange(start, start + padded[-1])
            parts = torch.where(place < end, place * batch + row, -1).view(2 * ranks, part)
            for receiver in range(ranks):
                tokens[receiver] += [parts[receiver], parts[2 * ranks - 1 - receiver]]
    orders = [torch.cat(of_rank) for of_rank in tokens]
    owners = [torch.where(order < 0, -1, order // (size * batch)) for order in orders]
    sent = [order[owner == rank] - rank * size * batch for order, owner in zip(orders, owners, strict=True)]
    placed = [(owners[rank] == sender).nonzero()[:, 0] for sender in range(ranks)]
    return Exchange(
        tuple(padded),
        torch.cat(sent).to(device),
        [len(t) for t in sent],
        torch.cat(placed).to(device),
        [len(t) for t in placed],
    )
