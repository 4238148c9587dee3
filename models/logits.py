"""Next-token logits of a sequence under any layout.

Legend: B batch, S sequence, V vocabulary.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.batch_context import GENERATE, BatchContext
from parallel.engine import Batch, Engine


@torch.no_grad()
def sequence_logits(engine: Engine, vocab_size: int, ids: list[int], first: int = 0) -> Tensor:
    """The logits of the tokens that follow each token of a sequence, with dropless routing. Every rank calls this
    together, with the same ids, and gets the same result.

    Args:
        first: index of the first token of `ids` whose logits are returned.

    Returns:
        fp32 [len(ids) - first, V] on the CPU.
    """
    runtime = engine.runtime
    groups, layout = runtime.groups, runtime.layout
    # Padded to a multiple of the shards: of cp and, inside the model, of tp; attention halves the shards of cp.
    cp = groups.cp.size()
    shards = math.lcm(cp * groups.tp.size(), 2 * cp if cp > 1 else 1)
    last, length = len(ids) - 1, -(-len(ids) // shards) * shards
    tokens = torch.tensor([ids + [0] * (length - len(ids))])
    begin = groups.cp.rank() * (length // cp)  # of this rank's shard
    mine = range(max(first, begin), min(len(ids), begin + length // cp))
    found: list[Tensor] = []

    def keep(logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if mine and groups.dp.rank() == 0:
            found.append(logits_BSV[0, mine.start - begin : mine.stop - begin].float())
        return torch.zeros((), device=runtime.device), torch.zeros((), device=runtime.device)

    at = torch.arange(length)[None]
    # Positions of padding are clamped: the table of rotary embeddings may end at the longest sequence.
    batch = {"tokens": tokens, "positions": at.clamp(max=last), "padding": at > last}
    # The interleaved schedule needs at least as many micro-batches as pipeline stages.
    engine.run_forward([batch] * (layout.pp if layout.vpp > 1 else 1), keep, BatchContext(GENERATE))
    # Each rank of the last stage fills its shard of the sequence and of the vocabulary; the others add zeros.
    logits_SV = torch.zeros(len(ids) - first, vocab_size, device=runtime.device)
    if found:
        rows_SV = logits_SV[mine.start - first : mine.stop - first]
        rows_SV.chunk(groups.tp.size(), dim=1)[groups.tp.rank()].copy_(found[0])
    dist.all_reduce(logits_SV)
    return logits_SV.cpu()


def next_token_logits(engine: Engine, vocab_size: int, ids: list[int]) -> Tensor:
    """fp32 logits [V] on the CPU of the token after `ids`. Every rank calls this together, with the same ids."""
    return sequence_logits(engine, vocab_size, ids, first=len(ids) - 1)[0]
