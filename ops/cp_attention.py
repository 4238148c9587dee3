"""Attention of sequences that are sharded over context-parallel ranks, by what passes keys and values around, or
exchanges heads for tokens, while it computes (parallel.cp_comm_type). Without it each rank gathers the keys and values
of all (models.attention.CoreAttention).

Legend: S sequence (this rank's slice), B batch, H heads of this rank, G key/value groups of this rank, N width of a
head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ops import te
from ops.attention_pieces import attention_pieces
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext
from ops.varlen_attention import masked_attention
from parallel.async_collectives import async_all_to_all, run_collective

CpAttention = Callable[[Tensor, Tensor, Tensor, int | None, Tensor | None], Tensor]
"""(q [S, B, H, N], k and v [S, B, G, N], the keys that a query sees at most or None, sinks [H] or None) ->
[S, B, H, N]. Slices follow each other by rank."""


def to_dual_chunks(x_SBHN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of n ranks' slices, the parts i and 2 n - 1 - i of 2 n on rank i, the order of Megatron-LM's batches and of
    TransformerEngine: the ranks have as much to do as each other when keys and values travel in turn."""
    rank, ranks = group.rank(), group.size()
    return _exchanged(x_SBHN, (2 * rank, 2 * rank + 1), (rank, 2 * ranks - 1 - rank), group)


def from_dual_chunks(x_SBHN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The other way round."""
    rank, ranks = group.rank(), group.size()
    return _exchanged(x_SBHN, (rank, 2 * ranks - 1 - rank), (2 * rank, 2 * rank + 1), group)


def _exchanged(x_SBHN: Tensor, have: tuple[int, int], want: tuple[int, int], group: dist.ProcessGroup) -> Tensor:
    """The parts `want` of the sequence, of which this rank has the parts `have`."""
    ranks = group.size()
    in_order = have == (2 * group.rank(), 2 * group.rank() + 1)

    def by_slice(part: int) -> int:
        return part // 2

    def by_dual_chunk(part: int) -> int:
        return min(part, 2 * ranks - 1 - part)

    source, target = (by_slice, by_dual_chunk) if in_order else (by_dual_chunk, by_slice)
    sent = sorted(have, key=lambda part: (target(part), part))
    received = sorted(want, key=lambda part: (source(part), part))
    parts, size = dict(zip(have, x_SBHN.chunk(2), strict=True)), len(x_SBHN) // 2
    rows = [
        [size * sum(of(part) == rank for part in moved) for rank in range(ranks)]
        for of, moved in ((target, sent), (source, received))
    ]
    x_SBHN = run_collective(torch.cat([parts[part] for part in sent]), async_all_to_all(rows[0], rows[1], group))
    parts = dict(zip(received, x_SBHN.chunk(2), strict=True))
    return torch.cat([parts[part] for part in want])


def _te(comm_type: str) -> Callable[[RunContext], CpAttention]:
    def load(context: RunContext) -> CpAttention:
        from ops.te_attention import TeCpAttention

        return te.load(lambda: TeCpAttention(context.groups.cp, comm_type))

    return load


def _whole(q_SBHN: Tensor, k_SBGN: Tensor, v_SBGN: Tensor, window: int | None, sinks_H: Tensor | None) -> Tensor:
    """A CpAttention of whole sequences."""
    positions_BS = torch.arange(len(q_SBHN)).unsqueeze(0)
    pieces = attention_pieces(positions_BS, 0, 1, False, window=window, sinks=True)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHN, k_SBGN, v_SBGN))
    assert pieces is not None
    return masked_attention(q, k, v, pieces, sinks_H).permute(2, 0, 1, 3)


def _trial(attend: CpAttention | None, context: RunContext) -> list[Tensor]:
    """With the window and the sinks that the run has; None: each rank attends with the whole sequence."""
    model, cp, tp = context.model, context.groups.cp, context.groups.tp.size()
    heads, groups, length = model.num_attention_heads // tp, model.query_groups // tp, 64 * cp.size()
    whole = [context.randn(length, 1, n, model.head_width, seed=seed) for seed, n in enumerate((heads, groups, groups))]
    above = context.randn(length, 1, heads, model.head_width, seed=3)
    sinks = [context.randn(heads, seed=4).requires_grad_()] if model.attention_sinks else []
    windows = [None] if model.sliding_window is None else [None, min(model.sliding_window, length // 2)]
    mine = slice(cp.rank() * 64, (cp.rank() + 1) * 64)
    results: list[Tensor] = []
    for window in windows:
        leaves = [t.clone().requires_grad_() if attend is None else t[mine].clone().requires_grad_() for t in whole]
        q_SBHN, k_SBGN, v_SBGN = leaves
        out = (attend or _whole)(q_SBHN, k_SBGN, v_SBGN, window, sinks[0] if sinks else None)
        gradients = torch.autograd.grad(out, [*leaves, *sinks], above if attend is None else above[mine])
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
