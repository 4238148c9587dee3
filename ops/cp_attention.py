"""Attention of sequences that are sharded over context-parallel ranks, by what passes keys and values around, or
exchanges heads for tokens, while it computes (parallel.cp_comm_type). Without it each rank gathers the keys and values
of all (models.attention.CoreAttention).

Legend: S sequence (this rank's slice), B batch, H heads of this rank, G key/value groups of this rank, N width of a
head.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ops import te
from ops.attention_pieces import Piece, attention_pieces
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext
from ops.varlen_attention import masked_attention

CpAttention = Callable[[Tensor, Tensor, Tensor, list[Piece] | None, Tensor | None], Tensor]
"""(q [S, B, H, N], k and v [S, B, G, N], the pieces of whole sequences or None, sinks [H] or None) -> [S, B, H, N].
Slices follow each other by rank."""


def _te(comm_type: str) -> Callable[[RunContext], CpAttention]:
    def load(context: RunContext) -> CpAttention:
        from ops.te_attention import TeCpAttention

        return te.load(lambda: TeCpAttention(context.groups.cp, comm_type))

    return load


def _whole(
    q_SBHN: Tensor, k_SBGN: Tensor, v_SBGN: Tensor, pieces: list[Piece] | None, sinks_H: Tensor | None
) -> Tensor:
    """A CpAttention of whole sequences."""
    assert pieces is not None
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHN, k_SBGN, v_SBGN))
    return masked_attention(q, k, v, pieces, sinks_H).permute(2, 0, 1, 3)


def _trial_pieces(context: RunContext, length: int) -> Iterator[list[Piece]]:
    """Of the layers that the run has, of two sequences; with documents or chunks of odd lengths, where it has them."""
    model, documents = context.model, context.config.data.document_mask
    positions_BS = torch.arange(length).repeat(2, 1)
    for row, start in ((0, 7), (0, length // 2 + 3), (1, length - 5)) if documents else ():
        positions_BS[row, start:] -= int(positions_BS[row, start])
    window, chunk = model.sliding_window, model.attention_chunk_size
    limits = {"window": window and min(window, length // 2), "chunk": chunk and min(chunk, length // 2 + 1)}
    for local in {False, bool(model.local_layers)}:
        pieces = attention_pieces(positions_BS, 0, 1, documents, **(limits if local else {}), sinks=True)
        assert pieces is not None
        yield pieces


def _trial(attend: CpAttention | None, context: RunContext) -> list[Tensor]:
    """With the documents, windows, chunks and sinks that the run has; None: each rank attends with the whole
    sequence."""
    model, cp, tp = context.model, context.groups.cp, context.groups.tp.size()
    heads, groups, length = model.num_attention_heads // tp, model.query_groups // tp, 64 * cp.size()
    whole = [context.randn(length, 2, n, model.head_width, seed=seed) for seed, n in enumerate((heads, groups, groups))]
    above = context.randn(length, 2, heads, model.head_width, seed=3)
    sinks = [context.randn(heads, seed=4).requires_grad_()] if model.attention_sinks else []
    mine = slice(cp.rank() * 64, (cp.rank() + 1) * 64)
    results: list[Tensor] = []
    for pieces in _trial_pieces(context, length):
        q, k, v = (t.clone().requires_grad_() if attend is None else t[mine].clone().requires_grad_() for t in whole)
        out = (attend or _whole)(q, k, v, pieces, sinks[0] if sinks else None)
        gradients = torch.autograd.grad(out, [q, k, v, *sinks], above if attend is None else above[mine])
        results += _shares([out.detach(), *gradients], mine, cp, is_whole=attend is None, sinks=len(sinks))
    return results


def _shares(
    results: Sequence[Tensor], mine: slice, cp: dist.ProcessGroup, *, is_whole: bool, sinks: int
) -> list[Tensor]:
    """This rank's slices, and the sinks' gradient of the whole sequence."""
    of_tokens, of_sinks = results[: len(results) - sinks], [t.float() for t in results[len(results) - sinks :]]
    if is_whole:
        return [*(t[mine] for t in of_tokens), *of_sinks]
    for gradient in of_sinks:
        dist.all_reduce(gradient, group=cp)
    return [*of_tokens, *of_sinks]


def _describe(context: RunContext, row: Row) -> Row:
    return Row(row.operation, f"TransformerEngine, {row.name}", row.why, row.refused)


CP_ATTENTION: Operation[CpAttention | None] = Operation(
    field="cp_attention",
    name="context-parallel attention",
    reference=lambda context: Implementation("all_gather", lambda context: None),
    implementations=[
        Implementation(name, _te(name), device="cuda", dtypes=(torch.bfloat16,), label=te.NAME)
        for name in ("p2p", "a2a")
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=lambda context: context.exchanges_sequence,
    setting="parallel.cp_comm_type",
    refusal="parallel.cp_comm_type={name}: TransformerEngine {reason}. Use parallel.cp_comm_type=all_gather",
    must_run=lambda context: True,
    is_collective=True,
    describe=_describe,
    standard="attention with the whole sequence",
)
