"""The context of a micro-batch that the engine passes to every layer together with the tokens.

Legend: B batch, S sequence, L sparse layers, K choices per token.
"""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

TRAIN, EVALUATE, GENERATE = "train", "evaluate", "generate"


class RoutingRecorder(Protocol):
    """Receives what the routers choose (moe.router_replay.RouterReplayRecorder)."""

    def record(self, micro_batch: int, layer: int, experts_SBK: Tensor, gates_SBK: Tensor, kept_SBK: Tensor) -> None:
        """Called once per sparse layer and micro-batch, with this rank's shard of the sequence.

        Args:
            kept_SBK: bool, False where the assignment was dropped.
        """


@dataclass(frozen=True)
class BatchContext:
    """What layers need to know about the micro-batch of a forward pass."""

    mode: str = TRAIN
    """train, evaluate or generate (dropless): selects the capacity and whether jitter and dropout apply."""
    loss_scale: float = 1.0
    """Factor that backward applies to losses that a layer attaches itself, so that they match the main loss."""
    step: int = 0
    micro_batch: int = 0
    """Index in the global batch of that step, counted over all data-parallel ranks. Together with the step it seeds
    the random numbers of this pass, independently of the layout."""
    host_positions_BS: Tensor | None = None
    """Positions of the whole sequence in host memory, from which document boundaries are read; None: the positions
    are on the device only."""
    padding_BS: Tensor | None = None
    """bool over this rank's shard of the sequence, True for padding; None: no padding."""
    labels_BS: Tensor | None = None
    """Labels of the whole sequence, from which those further ahead are read; None: there are none."""
    loss_mask_BS: Tensor | None = None
    """Of the whole sequence: the weight of each label in the loss, 0 where it counts in none; None: all count."""
    loss_labels: Tensor | None = None
    """What the sum of a micro-batch's weighted losses is divided by: the mean of the sums of the weights over the
    micro-batches of the global batch. None: the tokens of the micro-batch."""
    cache: Any = None
    """models.kv_cache.KVCache of the tokens before those of this pass, which are added to it; the model then returns
    the logits of the last token alone. None: the pass holds whole sequences."""
    routing: dict[int, tuple[Tensor, Tensor]] | None = None
    """With a cache: takes the experts and gates [T, K] of this rank's tokens by sparse layer; None: they are not
    kept."""
    routing_BSLK: Tensor | None = None
    """Router replay: the experts that the routers of the L sparse layers choose, over this rank's shard of the
    sequence; None: the routers choose."""
    routing_kept_BSLK: Tensor | None = None
    """Router replay: bool, which of these assignments are kept; None: the capacity decides."""
    recorder: RoutingRecorder | None = None
    """Router replay: what receives the choices; None: nothing does."""


DEFAULT_CONTEXT = BatchContext()
"""Training with an unscaled loss."""


_CURRENT: ContextVar[BatchContext | None] = ContextVar("current batch context", default=None)


def current() -> BatchContext | None:
    """The context of the micro-batch that is computed now, for adapters, which hook into layers that are not told;
    None outside of a block of the model. Recomputation (parallel.activation_checkpoint) restores that of the forward
    pass."""
    return _CURRENT.get()


@contextlib.contextmanager
def entered(batch_ctx: BatchContext | None) -> Generator[None]:
    """Makes it the current one."""
    token = _CURRENT.set(batch_ctx)
    try:
        yield
    finally:
        _CURRENT.reset(token)
