"""Causal attention over documents and over context-parallel shards, in memory that grows with the tokens and not with
their square: what a mask would say is split into rectangles and triangles that fused kernels know.

Legend: B batch, H heads of this rank, G key/value groups of this rank, S queries of this rank, K keys, N width of a
head, T packed tokens.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.operation import Implementation, Operation
from ops.run_context import RunContext


class Segment(NamedTuple):
    """Consecutive queries of one document. The last sees all keys up to end_key, each one before it one less."""

    queries: int
    first_key: int
    end_key: int


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of this rank."""

    queries: slice
    rows: list[list[Segment]]
    """Of each sequence of the batch, in order; a single entry: of all of them alike."""


VarlenAttention = Callable[[Tensor, Tensor, Tensor, list[Piece]], Tensor]
"""(q [B, H, S, N], k and v [B, G, K, N], pieces of the queries) -> [B, H, S, N]."""


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


def attention_pieces(positions_BS: Tensor, rank: int, ranks: int, document_mask: bool) -> list[Piece] | None:
    """Who may attend to whom; None where plain causal attention says it.

    Args:
        positions_BS: positions of the whole sequence, on the host; a 0 starts a document.
        rank, ranks: of the context-parallel group.
    """
    if ranks == 1 and not document_mask:
        return None
    batch, sequence = positions_BS.shape
    edges: list[list[int]] = [[0, sequence]]
    if document_mask:
        starts = [[] for _ in range(batch)]
        for row, start in (positions_BS == 0).nonzero().tolist():
            starts[row].append(start)
        edges = [sorted({0, *found, sequence}) for found in starts]
    pieces, done = [], 0
    for piece in query_pieces(sequence, rank, ranks):
        pieces.append(Piece(slice(done, done + len(piece)), [list(_segments(row, piece)) for row in edges]))
        done += len(piece)
    return pieces


def _segments(edges: list[int], piece: range) -> Iterator[Segment]:
    for begin, end in pairwise(edges):
        first, last = max(begin, piece.start), min(end, piece.stop)
        if first < last:
            yield Segment(last - first, begin, last)


def masked_attention(q_BHSN: Tensor, k_BGKN: Tensor, v_BGKN: Tensor, pieces: list[Piece]) -> Tensor:
    """The reference: a mask of queries by keys for each piece."""
    gqa = q_BHSN.shape[1] != k_BGKN.shape[1]
    out = []
    for piece in pieces:
        mask = piece_mask(piece, q_BHSN.device)
        seen = mask.shape[-1]
        keys = k_BGKN[:, :, :seen], v_BGKN[:, :, :seen]
        out.append(F.scaled_dot_product_attention(q_BHSN[:, :, piece.queries], *keys, attn_mask=mask, enable_gqa=gqa))
    return torch.cat(out, 2)


def piece_mask(piece: Piece, device: torch.device) -> Tensor:
    """bool [B or 1, 1, queries, keys up to the last that one of them may see]."""
    seen = max(segment.end_key for row in piece.rows for segment in row)
    key = torch.arange(seen, device=device)
    masks = []
    for row in piece.rows:
        query = torch.cat([torch.arange(s.end_key - s.queries, s.end_key, device=device) for s in row])
        first = torch.cat([torch.full((s.queries,), s.first_key, device=device) for s in row])
        masks.append((key <= query[:, None]) & (key >= first[:, None]))
    return torch.stack(masks).unsqueeze(1)


class _Joined(torch.autograd.Function):
    """Each segment's queries attend to the keys before them (a rectangle) and to their own (a triangle); the two are
    joined by their log-sum-exps (Rabe and Staats 2021, arXiv:2112.05682, section 2). The backward kernels get the
    joined result and log-sum-exp, from which they compute each part's own share of the probabilities."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece]) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, past, own in _parts(pieces):
            parts = [_forward(q[queries], k[own], v[own], causal=True)]
            if past:
                parts.append(_forward(q[queries], k[past], v[past], causal=False))
            out[queries], lse[queries[:3]] = parts[0] if len(parts) == 1 else _join(*parts)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces = pieces
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, past, own in _parts(ctx.pieces):
            above = grad[queries], q[queries]
            result = out[queries], lse[queries[:3]]
            for keys in (own, past) if past else (own,):
                of_q, of_k, of_v = _backward(*above, k[keys], v[keys], *result, causal=keys is own)
                dq[queries] += of_q
                dk[keys] += of_k
                dv[keys] += of_v
        return dq, dk, dv, None


def joined_attention(q_BHSN: Tensor, k_BGKN: Tensor, v_BGKN: Tensor, pieces: list[Piece]) -> Tensor:
    """masked_attention without a mask, on the fused kernels of the device."""
    return _Joined.apply(q_BHSN, k_BGKN, v_BGKN, pieces)


Index = tuple[slice, slice, slice]


def _parts(pieces: list[Piece]) -> Iterator[tuple[Index, Index | None, Index]]:
    """Of every segment where its queries lie, the keys before them (None: there are none), and their own keys."""
    for piece in pieces:
        for row, segments in enumerate(piece.rows):
            batch = slice(None) if len(piece.rows) == 1 else slice(row, row + 1)
            at = piece.queries.start
            for queries, first_key, end_key in segments:
                middle = end_key - queries
                past = (batch, slice(None), slice(first_key, middle)) if first_key < middle else None
                yield (
                    (batch, slice(None), slice(at, at + queries)),
                    past,
                    (batch, slice(None), slice(middle, end_key)),
                )
                at += queries


def _join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (out_a, lse_a), (out_b, lse_b) = one, other
    lse = torch.logaddexp(lse_a, lse_b)
    # In the precision of the sums, fp32 at least.
    out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    return out.to(out_a.dtype), lse


aten = torch.ops.aten


def _forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(result, fp32 log-sum-exp [B, H, S])."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    k, v = _all_heads(k, q), _all_heads(v, q)
    if q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        return out, lse[:, :, : q.shape[2]]  # padded to a multiple of the kernel's tile
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    groups, keys, values = k.shape[1], _all_heads(k, q), _all_heads(v, q)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    if q.dtype == torch.float32:
        lse = F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)  # as the forward kernel pads it
        seed, offset = seed[:1].long(), seed[1:].long()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, keys, values, None, out, lse, seed, offset, 0.0, [True, True, True, False], causal
        )
    else:
        lengths = None, None, q.shape[2], keys.shape[2]
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, keys, values, out, lse.contiguous(), *lengths, 0.0, causal, seed, seed
        )
    return dq, *(d.unflatten(1, (groups, -1)).sum(2) for d in (dk, dv))


def _all_heads(k_BGKN: Tensor, q_BHSN: Tensor) -> Tensor:
    """A key/value head for every query head."""
    return k_BGKN.repeat_interleave(q_BHSN.shape[1] // k_BGKN.shape[1], dim=1)


def varlen_attention(q_BHSN: Tensor, k_BGKN: Tensor, v_BGKN: Tensor, pieces: list[Piece]) -> Tensor:
    """masked_attention by torch.nn.attention.varlen: one launch for each piece, whatever the documents."""
    batch, heads, _, width = q_BHSN.shape
    out = []
    for piece in pieces:
        rows = piece.rows * (batch if len(piece.rows) == 1 else 1)
        lengths = [segment.queries for row in rows for segment in row]
        seen = [segment.end_key - segment.first_key for row in rows for segment in row]
        spans = [slice(row[0].first_key, row[-1].end_key) for row in rows]
        packed = [q_BHSN[:, :, piece.queries].transpose(1, 2).reshape(-1, heads, width)]
        packed += [_packed(t, spans) for t in (k_BGKN, v_BGKN)]
        out_THN = _varlen()(*packed, *(_offsets(n, q_BHSN.device) for n in (lengths, seen)), max(lengths), max(seen))
        out.append(out_THN.view(batch, -1, heads, width).transpose(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _packed(k_BGKN: Tensor, spans: list[slice]) -> Tensor:
    """[T, G, N]: of every sequence the keys from the first document on that a query is in."""
    whole = slice(0, k_BGKN.shape[2])
    if all(span == whole for span in spans):
        return k_BGKN.transpose(1, 2).flatten(0, 1)
    return torch.cat([k[:, span].transpose(0, 1) for k, span in zip(k_BGKN.unbind(0), spans, strict=True)])


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@cache
def _varlen() -> Callable[..., Tensor]:
    """torch's function with the causal window; grouped queries have to be named from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return lambda *arguments: varlen_attn(*arguments, **options)


def _trial(attend: VarlenAttention, context: RunContext) -> list[Tensor]:
    """Two sequences: documents that end within a piece, reach over both, and begin before the first query."""
    ranks, width = context.groups.tp.size(), context.model.head_width
    heads, keys = context.model.num_attention_heads // ranks, context.model.query_groups // ranks
    rows = [[Segment(40, 30, 150), Segment(30, 150, 180)], [Segment(70, 0, 180)]]
    late = [[Segment(1, 170, 181), Segment(57, 181, 238)], [Segment(58, 100, 238)]]
    pieces = [Piece(slice(0, 70), rows), Piece(slice(70, 128), late)]
    q, k, v = (
        context.randn(2, h, tokens, width, seed=seed).requires_grad_()
        for seed, (h, tokens) in enumerate(((heads, 128), (keys, 256), (keys, 256)))
    )
    out = attend(q, k, v, pieces)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), context.randn(*out.shape, seed=3))]


VARLEN_ATTENTION = Operation(
    field="varlen_attention",
    name="attention",
    reference=lambda context: Implementation("torch, under a mask", lambda context: masked_attention),
    implementations=[
        Implementation("torch varlen", lambda context: varlen_attention, device="cuda", dtypes=(torch.bfloat16,)),
        Implementation("joined by log-sum-exp", "ops.varlen_attention:joined_attention"),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=lambda context: context.needs_varlen,
)
