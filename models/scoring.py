"""Log-likelihoods of continuations under any layout.

Legend: B batch, S sequence, V vocabulary (this rank's shard), N scored tokens.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.batch_context import GENERATE, BatchContext
from parallel.engine import Batch, Engine

Request = tuple[list[int], int]
"""Tokens, and how many of the last of them are scored, at least one less than there are tokens."""
ROWS = 1024
"""Scored tokens whose logits are converted to fp32 at a time."""


@torch.no_grad()
def score_continuations(engine: Engine, requests: Sequence[Request], batch_size: int) -> list[tuple[float, int]]:
    """The log-likelihood in nats of the last tokens of each request given those before them, and how many of them are
    the most likely ones (the lower token where two are equally likely). Every rank calls this together, with the same
    requests, and gets the same result.

    Routing is dropless and padding is neither routed nor counted, so that the other requests of a batch have no effect.

    Args:
        batch_size: requests per micro-batch.
    """
    for chunk in engine.chunks:
        chunk.eval()
    groups, layout = engine.runtime.groups, engine.runtime.layout
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][0]), i))
    scores = torch.zeros(len(requests), 2, dtype=torch.float64, device=engine.runtime.device)
    # As many micro-batches as there are pipeline stages: the interleaved schedule needs a multiple of them.
    at_once = batch_size * layout.pp
    for start in range(0, len(order), at_once * groups.dp.size()):
        everyone = order[start : start + at_once * groups.dp.size()]
        shards = math.lcm(groups.cp.size() * groups.tp.size(), 2 * groups.cp.size() if groups.cp.size() > 1 else 1)
        length = -(-(len(requests[everyone[0]][0]) - 1) // shards) * shards
        first = groups.dp.rank() * at_once
        mine = everyone[first : first + at_once]
        batches = [
            _batch([requests[i] for i in mine[j : j + batch_size]], batch_size, length)
            for j in range(0, at_once, batch_size)
        ]
        parts: list[Tensor] = []

        def keep(logits_BSV: Tensor, batch: Batch, parts: list[Tensor] = parts) -> tuple[Tensor, Tensor]:
            parts.append(_score(engine, logits_BSV, batch))
            return torch.zeros((), device=logits_BSV.device), torch.zeros((), device=logits_BSV.device)

        engine.run_forward(batches, keep, BatchContext(GENERATE))
        if mine and parts and groups.tp.rank() == 0:  # a rank of the last stage
            scores.index_add_(0, torch.tensor(mine, device=scores.device), torch.cat(parts)[: len(mine)])
    dist.all_reduce(scores)
    return [(nats, round(greedy)) for nats, greedy in scores.tolist()]


def _batch(requests: list[Request], batch_size: int, length: int) -> Batch:
    """A micro-batch padded on the right, and to batch_size sequences."""
    tokens, targets = (torch.zeros(batch_size, length, dtype=torch.int64) for _ in range(2))
    scored, padding = (
        torch.zeros(batch_size, length, dtype=torch.bool),
        torch.ones(batch_size, length, dtype=torch.bool),
    )
    positions = torch.zeros(batch_size, length, dtype=torch.int64)
    for row, (ids, count) in enumerate(requests):
        size = len(ids) - 1
        assert 0 < count <= size
        tokens[row, :size], targets[row, :size] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        scored[row, size - count : size], padding[row, :size] = True, False
        # Clamped in the padding: the table of rotary embeddings may end at the longest sequence.
        positions[row] = torch.arange(length).clamp(max=size - 1)
    if len(requests) < batch_size:
        positions[len(requests) :] = torch.arange(length).clamp(max=len(requests[0][0]) - 2 if requests else 0)
    return {"tokens": tokens, "positions": positions, "padding": padding, "targets": targets, "scored": scored}


def _score(engine: Engine, logits_BSV: Tensor, batch: Batch) -> Tensor:
    """fp64 [B, 2]: the sums over this rank's shard of the sequence."""
    cp, tp = engine.runtime.groups.cp, engine.runtime.groups.tp
    scored_BS, targets_BS = (batch[name].chunk(cp.size(), dim=1)[cp.rank()] for name in ("scored", "targets"))
    row_N = scored_BS.nonzero()[:, 0]
    logits_NV, targets_N = logits_BSV[scored_BS], targets_BS[scored_BS]
    sums = torch.zeros(len(scored_BS), 2, dtype=torch.float64, device=logits_BSV.device)
    for at in range(0, len(row_N), ROWS):
        rows = slice(at, at + ROWS)
        sums.index_add_(0, row_N[rows], _token_scores(logits_NV[rows].float(), targets_N[rows], tp))
    return sums


def _token_scores(logits_NV: Tensor, targets_N: Tensor, tp: dist.ProcessGroup) -> Tensor:
    """fp64 [N, 2]: the log-probability of each target, and 1 where no other token is more likely."""
    shard = logits_NV.shape[1]
    offset = tp.rank() * shard
    largest_N, best_N = logits_NV.max(1)
    whole_N = largest_N.clone()
    dist.all_reduce(whole_N, op=dist.ReduceOp.MAX, group=tp)
    best_N = torch.where(largest_N == whole_N, best_N + offset, torch.iinfo(torch.int64).max)
    dist.all_reduce(best_N, op=dist.ReduceOp.MIN, group=tp)
    local_N = targets_N - offset
    here_N = (local_N >= 0) & (local_N < shard)
    target_N = logits_NV.gather(1, local_N.clamp(0, shard - 1)[:, None])[:, 0].masked_fill(~here_N, 0.0)
    sums_2N = torch.stack([(logits_NV - whole_N[:, None]).exp().sum(1), target_N])
    dist.all_reduce(sums_2N, group=tp)
    powers_N, target_N = sums_2N
    log_probs_N = target_N - whole_N - powers_N.log()
    return torch.stack([log_probs_N.double(), (best_N == targets_N).double()], dim=1)
