"""Next-token logits of a batch of growing sequences, with a key/value cache, under any layout that does not shard the
sequence.

Legend: R sequences, B sequences of this rank, S tokens of a pass, V vocabulary, K choices per token.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig
from models.kv_cache import KVCache
from parallel.batch_context import GENERATE, BatchContext
from parallel.engine import Batch, Engine
from parallel.layout import cache_unsupported_reason

T = TypeVar("T")
Routed = dict[int, tuple[list[list[int]], list[list[float]]]]
"""Of a sequence's new tokens: sparse layer -> (experts, gates), each `[S, K]`."""


class CachedLogits:
    """Every rank makes the same calls with the same arguments and gets the same result. Sequences are shared out over
    the data-parallel ranks. Routing is dropless, and padding is neither attended to nor routed.

    A context holds at most `limit` tokens, as many as the model was trained on: one that would outgrow it loses its
    older half, and what is left is read again from position 0.
    """

    def __init__(self, engine: Engine, model: ModelConfig, limit: int, *, trace: bool = False):
        """Args:
        limit: tokens of a context, the sequence length of the model's rotary embedding at most.
        trace: keeps what the routers decide (`routed`).
        """
        layout = engine.runtime.layout
        assert cache_unsupported_reason(cp=layout.cp, sequence_parallel=layout.sequence_parallel) is None
        self.engine, self.model, self.limit, self.trace = engine, model, limit, trace
        self.contexts: list[list[int]] = []
        """The tokens that each sequence sees; none where it has ended."""
        self.routed: list[Routed] = []
        """Of each sequence, of the tokens that the last call added."""
        scaling = model.rope_scaling
        self._short_length = scaling.original_max_position_embeddings if scaling.type == "longrope" else None
        self._cache = KVCache([])

    def start(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Begins with a new batch. Returns fp32 [R, V] on the CPU: the logits of the token after each context, of which
        none is empty; of a context longer than the limit the last tokens count."""
        self.contexts = [list(context[-self.limit :]) for context in contexts]
        return self._read([len(context) for context in self.contexts])

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Adds a token to each sequence. Returns the logits of those after it, [R, V].

        Args:
            tokens: None: the sequence has ended, and its logits have no meaning.
        """
        again, added = False, [0 if token is None else 1 for token in tokens]
        for row, token in enumerate(tokens):
            if token is None:
                self.contexts[row] = []
                continue
            context = self.contexts[row]
            if len(context) == self.limit:
                del context[: -max(1, self.limit // 2)]
                again = True
            context.append(token)
            # LongRoPE rotates all keys anew when a sequence outgrows the length of pre-training.
            again |= self._short_length is not None and len(context) == self._short_length + 1
        if again:
            return self._read(added)
        new = [[0 if token is None else token] for token in tokens]
        return self._forward(new, [token is None for token in tokens], added)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Adds several tokens to the only sequence of the batch."""
        (context,) = self.contexts
        end = len(context) + len(tokens)
        crossed = self._short_length is not None and len(context) <= self._short_length < end
        context.extend(tokens)
        if end > self.limit:
            del context[: -max(1, self.limit // 2)]
        if end > self.limit or crossed:
            return self._read([min(len(tokens), len(context))])
        return self._forward([list(tokens)], [False], [len(tokens)])

    def _read(self, added: list[int]) -> Tensor:
        """The logits after all contexts, with a new cache."""
        longest = max(1, *(len(context) for context in self.contexts), 1)
        padding = [longest - len(context) for context in self.contexts]
        self._cache = KVCache(self._mine(padding, longest))
        tokens = [[0] * n + context for n, context in zip(padding, self.contexts, strict=True)]
        return self._forward(tokens, [False] * len(tokens), added)

    def _mine(self, of_sequences: list[T], otherwise: T) -> list[T]:
        """Of this data-parallel rank's sequences; `otherwise` for those that are missing from the last rank."""
        dp = self.engine.runtime.groups.dp
        each = -(-len(of_sequences) // dp.size())
        mine = of_sequences[dp.rank() * each : (dp.rank() + 1) * each]
        return mine + [otherwise] * (each - len(mine))

    @torch.no_grad()
    def _forward(self, tokens_RS: list[list[int]], ended: list[bool], added: list[int]) -> Tensor:
        engine, cache = self.engine, self._cache
        groups, layout, device = engine.runtime.groups, engine.runtime.layout, engine.runtime.device
        length, sequences = len(tokens_RS[0]), len(tokens_RS)
        tokens_BS = torch.tensor(self._mine(tokens_RS, [0] * length))
        position_BS = torch.arange(cache.length, cache.length + length) - torch.tensor(cache.padding)[:, None]
        batch = {"tokens": tokens_BS, "positions": position_BS.clamp(0, self.limit - 1)}
        mine_ended = self._mine(ended, True)
        if any(mine_ended) or (not cache.length and any(cache.padding)):
            batch["padding"] = (position_BS < 0) | torch.tensor(mine_ended)[:, None]
        found: list[Tensor] = []
        routing = {} if self.trace else None

        def keep(logits_B1V: Tensor, _batch: Batch) -> tuple[Tensor, Tensor]:
            found[:] = [logits_B1V[:, 0].float()]
            return torch.zeros((), device=device), torch.zeros((), device=device)

        # The interleaved schedule needs at least as many micro-batches as pipeline stages: it repeats this one.
        passes = [batch] * (layout.pp if layout.vpp > 1 else 1)
        engine.run_forward(passes, keep, BatchContext(GENERATE, cache=cache, routing=routing))
        cache.advance(length)
        if routing is not None:
            self.routed = self._gathered(routing, len(tokens_BS), added)
        if dist.get_world_size() == 1:
            return found[0].cpu()
        # Each rank of the last stage fills its sequences and its shard of the vocabulary; the others add zeros.
        rows = len(tokens_BS)
        logits_RV = torch.zeros(rows * groups.dp.size(), self.model.vocab_size, device=device)
        if found:
            mine_BV = logits_RV[groups.dp.rank() * rows : (groups.dp.rank() + 1) * rows]
            mine_BV.chunk(groups.tp.size(), dim=1)[groups.tp.rank()].copy_(found[0])
        dist.all_reduce(logits_RV)
        return logits_RV[:sequences].cpu()

    def _gathered(self, routing: dict[int, tuple[Tensor, Tensor]], rows: int, added: list[int]) -> list[Routed]:
        """What all ranks' routers decided, by sequence."""
        mine: dict[int, tuple[list[Any], list[Any]]] = {}
        for layer, (experts_TK, gates_TK) in routing.items():
            of_rows = (t.unflatten(0, (-1, rows)).transpose(0, 1).tolist() for t in (experts_TK, gates_TK))
            experts_BSK, gates_BSK = of_rows
            mine[layer] = experts_BSK, gates_BSK
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (self.engine.runtime.groups.dp.rank(), mine))
        routed: list[Routed] = [{} for _ in added]
        for dp_rank, layers in of_ranks:
            for layer, (experts_BSK, gates_BSK) in sorted(layers.items()):
                for row, both in enumerate(zip(experts_BSK, gates_BSK, strict=True), start=dp_rank * rows):
                    if row < len(added) and added[row]:
                        experts_SK, gates_SK = (of_row[-added[row] :] for of_row in both)
                        routed[row][layer] = experts_SK, gates_SK
        return [dict(sorted(layers.items())) for layers in routed]
