"""Causal attention over documents, chunks, sliding windows and context-parallel shards, with attention sinks, in memory
that grows with the tokens and not with their square: what a mask would say is split into rectangles and triangles that
fused kernels know.

Legend: B batch, H heads of this rank, G key/value groups of this rank, S queries of this rank, K keys, N width of a
head, T packed tokens.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import te
from ops.attention_pieces import Piece, Segment, piece_mask
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext

VarlenAttention = Callable[[Tensor, Tensor, Tensor, list[Piece], Tensor | None], Tensor]
"""(q [B, H, S, N], k and v [B, G, K, N], pieces of the queries, sinks [H] or none) -> [B, H, S, N]. A sink is a logit
that takes part in the softmax and has no value (gpt-oss; arXiv:2309.17453, section 3.3)."""


def masked_attention(
    q_BHSN: Tensor, k_BGKN: Tensor, v_BGKN: Tensor, pieces: list[Piece], sinks_H: Tensor | None = None
) -> Tensor:
    """The reference: a mask of queries by keys for each piece. A sink is a key of zeros with a value of zeros."""
    batch, heads = q_BHSN.shape[:2]
    gqa, out = heads != k_BGKN.shape[1], []
    for piece in pieces:
        mask = piece_mask(piece, q_BHSN.device)
        seen = mask.shape[-1]
        keys = [t[:, :, :seen] for t in (k_BGKN, v_BGKN)]
        if sinks_H is not None:
            keys = [F.pad(t, (0, 0, 0, 1)) for t in keys]
            wide = batch, heads, mask.shape[2]
            unseen = torch.zeros_like(mask, dtype=q_BHSN.dtype).masked_fill(~mask, -math.inf)
            sinks = sinks_H.to(q_BHSN.dtype).view(1, -1, 1, 1)
            mask = torch.cat([unseen.expand(*wide, seen), sinks.expand(*wide, 1)], -1)
        out.append(F.scaled_dot_product_attention(q_BHSN[:, :, piece.queries], *keys, attn_mask=mask, enable_gqa=gqa))
    return torch.cat(out, 2)


class _Joined(torch.autograd.Function):
    """The parts of what each run of queries sees (`_runs`), joined by their log-sum-exps (Rabe and Staats 2021,
    arXiv:2112.05682, section 2). The backward kernels get the joined result and log-sum-exp, from which they compute
    each part's own share of the probabilities; a sink, which has no value, only adds to the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], sinks_H: Tensor | None) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for first, *others in _runs(pieces):
            joined = _forward(q[first.queries], k[first.keys], v[first.keys], causal=True)
            for part in others:
                attended = _forward(*part.ordered(q, k, v), causal=part.reversed)
                joined = _join(joined, (attended[0].flip(2), attended[1].flip(2)) if part.reversed else attended)
            if sinks_H is not None:
                joined = _add_sinks(*joined, sinks_H)
            out[first.queries], lse[first.queries[:3]] = joined
        ctx.save_for_backward(q, k, v, out, lse, sinks_H)
        ctx.pieces = pieces
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks_H = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for run in _runs(ctx.pieces):
            for part in run:
                above, result = (grad[part.queries], out[part.queries]), lse[part.queries[:3]]
                if part.reversed:
                    above, result = tuple(t.flip(2) for t in above), result.flip(2)
                of_q, of_k, of_v = _backward(
                    above[0], *part.ordered(q, k, v), above[1], result, causal=part is run[0] or part.reversed
                )
                dq[part.queries] += of_q.flip(2) if part.reversed else of_q
                dk[part.keys] += of_k.flip(2) if part.reversed else of_k
                dv[part.keys] += of_v.flip(2) if part.reversed else of_v
        return dq, dk, dv, None, None if sinks_H is None else _sinks_gradient(grad, out, lse, sinks_H)


def joined_attention(
    q_BHSN: Tensor, k_BGKN: Tensor, v_BGKN: Tensor, pieces: list[Piece], sinks_H: Tensor | None = None
) -> Tensor:
    """masked_attention without a mask, on the fused kernels of the device."""
    return _Joined.apply(q_BHSN, k_BGKN, v_BGKN, pieces, sinks_H)


Index = tuple[slice, slice, slice]


class _Part(NamedTuple):
    """Queries and keys of one kernel."""

    queries: Index
    keys: Index
    reversed: bool = False
    """The first query sees all of these keys, each one after it one less: in reversed order it is causal."""

    def ordered(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = q[self.queries], k[self.keys], v[self.keys]
        return (q.flip(2), k.flip(2), v.flip(2)) if self.reversed else (q, k, v)


def _runs(pieces: list[Piece]) -> Iterator[list[_Part]]:
    """Runs of queries, each as parts: the run's own keys (a triangle), earlier keys that all of its queries see (a
    rectangle), and those that the window takes from one after the other (a reversed triangle). The queries of the
    latter two are the first ones of the run."""
    for piece in pieces:
        for row, segments in enumerate(piece.rows):
            batch = slice(None) if len(piece.rows) == 1 else slice(row, row + 1)
            at = piece.queries.start
            for segment in segments:
                for queries, first_key, end_key in _within_window(segment, piece.window):
                    middle = end_key - queries
                    # Where the window is full, the run's first query sees first_key, and the second one no more.
                    taken = queries - 1 if piece.window and middle - first_key == piece.window - 1 else 0
                    spans = [(queries, middle, end_key), (queries, first_key + taken, middle)]
                    spans += [(taken, first_key, first_key + taken)]
                    yield [
                        _Part((batch, slice(None), slice(at, at + n)), (batch, slice(None), slice(first, end)), i == 2)
                        for i, (n, first, end) in enumerate(spans)
                        if n and first < end
                    ]
                    at += queries


def _within_window(segment: Segment, window: int | None) -> Iterator[Segment]:
    """A segment as runs of queries for which first_key is the first key of the first query: queries that see the whole
    document so far, and runs of at most as many queries as the window has keys."""
    queries, first_key, end_key = segment
    if window is None:
        yield segment
        return
    start, whole = end_key - queries, min(first_key + window, end_key)
    if start < whole:
        yield Segment(whole - start, first_key, whole)
    for begin in range(max(start, whole), end_key, window):
        end = min(begin + window, end_key)
        yield Segment(end - begin, begin - window + 1, end)


def _join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of a run, and of its first queries. In the precision of the sums, fp32 at least."""
    (out_a, lse_a), (out_b, lse_b), first = one, other, slice(0, other[1].shape[2])
    lse = torch.logaddexp(lse_a[:, :, first], lse_b)
    out = out_a[:, :, first] * (lse_a[:, :, first] - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    if lse.shape == lse_a.shape:
        return out, lse
    return torch.cat([out, out_a[:, :, first.stop :]], 2), torch.cat([lse, lse_a[:, :, first.stop :]], 2)


def _add_sinks(out: Tensor, lse: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """With the sinks in the denominator. lse: [..., H, S], out the same with the width of a head."""
    total = torch.logaddexp(lse, sinks_H.to(lse.dtype)[:, None])
    return out * (lse - total).exp()[..., None], total


def _sinks_gradient(grad_BHSN: Tensor, out_BHSN: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """The probability of a sink is p = exp(sink - lse); its logit's gradient is p * (0 - grad . out), 0 being its value
    times grad."""
    share_BHS = (sinks_H.to(lse_BHS.dtype)[:, None] - lse_BHS).exp()
    return -(share_BHS * (grad_BHSN.to(lse_BHS.dtype) * out_BHSN).sum(-1)).sum((0, 2)).to(sinks_H.dtype)


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


PackedAttention = Callable[[Tensor, Tensor, Tensor, "Packing", Tensor | None], Tensor]
"""(q [T, H, N], k and v [T, G, N], how they are packed, the logits of the sinks [H] or None) -> [T, H, N]."""


@dataclass(frozen=True)
class Packing:
    """Runs of queries, each of which sees keys up to that of its last query."""

    queries: list[int]
    """Of each run."""
    keys: list[int]
    """Of each run; at least as many."""
    before: int
    """Keys that a query sees before its own; -1: all."""


def packed_attention(
    attend: PackedAttention,
    q_BHSN: Tensor,
    k_BGKN: Tensor,
    v_BGKN: Tensor,
    pieces: list[Piece],
    sinks_H: Tensor | None = None,
) -> Tensor:
    """masked_attention with one launch for each piece, whatever the documents."""
    batch, heads, _, width = q_BHSN.shape
    out = []
    for piece in pieces:
        rows = piece.rows * (batch if len(piece.rows) == 1 else 1)
        lengths = [segment.queries for row in rows for segment in row]
        seen = [segment.end_key - segment.first_key for row in rows for segment in row]
        spans = [slice(row[0].first_key, row[-1].end_key) for row in rows]
        packed = [q_BHSN[:, :, piece.queries].transpose(1, 2).reshape(-1, heads, width)]
        packed += [_packed(t, spans) for t in (k_BGKN, v_BGKN)]
        packing = Packing(lengths, seen, -1 if piece.window is None else piece.window - 1)
        out_THN = attend(packed[0], packed[1], packed[2], packing, sinks_H)
        out.append(out_THN.view(batch, -1, heads, width).transpose(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _torch_varlen(q_THN: Tensor, k_TGN: Tensor, v_TGN: Tensor, packing: Packing, sinks_H: Tensor | None) -> Tensor:
    """By torch.nn.attention.varlen."""
    offsets = (run_offsets(n, q_THN.device) for n in (packing.queries, packing.keys))
    arguments = (q_THN, k_TGN, v_TGN, *offsets, max(packing.queries), max(packing.keys), packing.before)
    return _varlen()(*arguments) if sinks_H is None else _WithSinks.apply(*arguments, sinks_H)


varlen_attention: VarlenAttention = partial(packed_attention, _torch_varlen)


class _WithSinks(torch.autograd.Function):
    """torch.nn.attention.varlen has no gradient for its log-sum-exp: its kernels, with the sinks joined as in
    _Joined."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        *packing, before, sinks_H = arguments
        limits = {"window_size_left": before, "window_size_right": 0}
        out, lse_HT, *_ = aten._flash_attention_forward(q, k, v, *packing, 0.0, before < 0, False, **limits)
        out_HTN, lse_HT = _add_sinks(out.transpose(0, 1), lse_HT, sinks_H)
        out = out_HTN.transpose(0, 1).to(q.dtype).contiguous()
        ctx.save_for_backward(q, k, v, out, lse_HT, sinks_H, *packing[:2])
        ctx.sizes, ctx.before, ctx.limits = packing[2:], before, limits
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HT, sinks_H, *offsets = ctx.saved_tensors
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        how = (*offsets, *ctx.sizes, 0.0, ctx.before < 0, seed, seed)
        gradients = aten._flash_attention_backward(grad.contiguous(), q, k, v, out, lse_HT, *how, **ctx.limits)
        of_sinks = _sinks_gradient(grad.transpose(0, 1)[None], out.transpose(0, 1)[None], lse_HT[None], sinks_H)
        return *gradients, *[None] * 5, of_sinks


def _packed(k_BGKN: Tensor, spans: list[slice]) -> Tensor:
    """[T, G, N]: of every sequence the keys from the first document on that a query is in."""
    whole = slice(0, k_BGKN.shape[2])
    if all(span == whole for span in spans):
        return k_BGKN.transpose(1, 2).flatten(0, 1)
    return torch.cat([k[:, span].transpose(0, 1) for k, span in zip(k_BGKN.unbind(0), spans, strict=True)])


def run_offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32: where each run begins, and the end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@cache
def _varlen() -> Callable[..., Tensor]:
    """torch's function, its last argument the keys that a query sees before its own (-1: all); grouped queries have to
    be named from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    attend = cast("Callable[..., Tensor]", varlen_attn)
    return lambda *arguments: attend(*arguments[:-1], window_size=(arguments[-1], 0), **gqa)


def _te(context: RunContext) -> VarlenAttention:
    from ops.te_attention import TeAttention

    return te.load(TeAttention).varlen


def _trial(attend: VarlenAttention, context: RunContext) -> list[Tensor]:
    """Two sequences: documents that end within a piece, reach over both, and begin before the first query."""
    model, ranks = context.model, context.groups.tp.size()
    heads, keys = model.num_attention_heads // ranks, model.query_groups // ranks
    rows = [[Segment(40, 30, 150), Segment(30, 150, 180)], [Segment(70, 0, 180)]]
    late = [[Segment(1, 170, 181), Segment(57, 181, 238)], [Segment(58, 100, 238)]]
    window = None if model.sliding_window is None else min(model.sliding_window, 50)
    pieces = [Piece(slice(0, 70), rows, window), Piece(slice(70, 128), late, window)]
    leaves = [
        context.randn(2, h, tokens, model.head_width, seed=seed).requires_grad_()
        for seed, (h, tokens) in enumerate(((heads, 128), (keys, 256), (keys, 256)))
    ]
    sinks = [context.randn(heads, seed=4).requires_grad_()] if model.attention_sinks else []
    q_BHSN, k_BGKN, v_BGKN = leaves
    out = attend(q_BHSN, k_BGKN, v_BGKN, pieces, sinks[0] if sinks else None)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *sinks], context.randn(*out.shape, seed=3))]


def _describe(context: RunContext, row: Row) -> Row:
    """By the layers that call it where others attend to all tokens."""
    return replace(row, operation="local attention") if context.needs_causal else row


VARLEN_ATTENTION: Operation[VarlenAttention] = Operation(
    field="varlen_attention",
    name="attention",
    reference=lambda context: Implementation("torch, under a mask", lambda context: masked_attention),
    implementations=[
        Implementation(
            te.NAME,
            _te,
            device="cuda",
            dtypes=(torch.bfloat16,),
            is_supported=te.is_meant,
        ),
        Implementation("torch varlen", lambda context: varlen_attention, device="cuda", dtypes=(torch.bfloat16,)),
        Implementation("joined by log-sum-exp", "ops.varlen_attention:joined_attention"),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=lambda context: context.needs_varlen,
    asked=te.asked,
    refusal=f"attention: {te.REFUSAL}",
    describe=_describe,
)
