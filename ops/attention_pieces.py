"""Who may attend to whom in causal attention over documents, chunks, sliding windows and context-parallel shards.

Legend: B batch, S sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive queries of one document or chunk. The last sees all keys up to end_key, each one before it one less;
    under a window only the last of them (Piece.window)."""

    queries: int
    first_key: int
    end_key: int


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of this rank."""

    queries: slice
    rows: list[list[Segment]]
    """Of each sequence of the batch, in order; a single entry: of all of them alike."""
    window: int | None = None
    """Keys that a query sees at most, its own included; None: no limit."""


def query_pieces(sequence: int, rank: int, ranks: int) -> list[range]:
    """The positions whose queries a context-parallel rank attends with.

    Each rank holds a shard of the sequence, but the later a token the more it looks back on: attending with its own
    queries, the last rank would have nearly all the work. So rank i keeps the earlier half of its shard and exchanges
    the later one with rank n - 1 - i. With the sequence in 2 n parts, i then has parts 2 i and 2 (n - 1 - i) + 1,
    which look back on 2 i + 1 and 2 (n - 1 - i) + 2 parts: together 2 n + 1, whatever i.
    """
    if ranks == 1:
        return [range(sequence)]
    size = sequence // (2 * ranks)
    return [range(part * size, (part + 1) * size) for part in (2 * rank, 2 * (ranks - 1 - rank) + 1)]


def attention_pieces(
    positions_BS: Tensor,
    rank: int,
    ranks: int,
    document_mask: bool,
    *,
    window: int | None = None,
    chunk: int | None = None,
    sinks: bool = False,
) -> list[Piece] | None:
    """Who may attend to whom; None where plain causal attention says it.

    Args:
        positions_BS: positions of the whole sequence, on the host; a 0 starts a document.
        rank, ranks: of the context-parallel group.
        window: keys that a query sees at most, its own included; None: no limit.
        chunk: size of the chunks, counted from the start of a document, outside of which a query sees nothing; None:
            no chunks.
        sinks: never None, since plain causal attention takes no sinks.
    """
    sequence = positions_BS.shape[1]
    window, chunk = (None if size is None or size >= sequence else size for size in (window, chunk))
    if ranks == 1 and not (document_mask or window or chunk or sinks):
        return None
    starts: list[dict[int, int]] = [{0: 0}]
    """Of each sequence: where documents start -> the position there."""
    if document_mask:
        starts = [{0: first} for first in positions_BS[:, 0].tolist()]
        for row, start in (positions_BS == 0).nonzero().tolist():
            starts[row][start] = 0
    edges = [_edges(found, sequence, chunk) for found in starts]
    pieces, done = [], 0
    for piece in query_pieces(sequence, rank, ranks):
        rows = [list(_segments(row, piece)) for row in edges]
        pieces.append(Piece(slice(done, done + len(piece)), rows, window))
        done += len(piece)
    return pieces


def _edges(starts: dict[int, int], sequence: int, chunk: int | None) -> list[int]:
    """Where documents and their chunks begin, and the end of the sequence."""
    ends = [*sorted(starts), sequence]
    if chunk is None:
        return ends
    of_chunks = [
        edge for start, end in pairwise(ends) for edge in range(start + chunk - starts[start] % chunk, end, chunk)
    ]
    return sorted({*ends, *of_chunks})


def _segments(edges: list[int], piece: range) -> Iterator[Segment]:
    for begin, end in pairwise(edges):
        first, last = max(begin, piece.start), min(end, piece.stop)
        if first < last:
            yield Segment(last - first, begin, last)


def piece_mask(piece: Piece, device: torch.device) -> Tensor:
    """bool [B or 1, 1, queries, keys up to the last that one of them may see]."""
    seen = max(segment.end_key for row in piece.rows for segment in row)
    key = torch.arange(seen, device=device)
    masks = []
    for row in piece.rows:
        query = torch.cat([torch.arange(s.end_key - s.queries, s.end_key, device=device) for s in row])
        first = torch.cat([torch.full((s.queries,), s.first_key, device=device) for s in row])
        if piece.window is not None:
            first = torch.maximum(first, query - piece.window + 1)
        masks.append((key <= query[:, None]) & (key >= first[:, None]))
    return torch.stack(masks).unsqueeze(1)
