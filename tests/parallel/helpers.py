"""The tiny model of the parity matrix, trained, saved and looked into."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from benchmarks.parity import measure
from benchmarks.tiny import (
    MICRO_BATCH,
    MICRO_BATCHES,
    OPTIM,
    SEQUENCE,
    VOCABULARY,
    Variant,
    build_engine,
    gather,
    gradients,
    micro_batch,
    my_batches,
    started,
)
from parallel.engine import Engine
from parallel.optimizers import OPTIMIZERS

__all__ = [
    "MICRO_BATCH",
    "MICRO_BATCHES",
    "OPTIM",
    "SEQUENCE",
    "VOCABULARY",
    "Variant",
    "build_engine",
    "gather",
    "gradients",
    "measure",
    "micro_batch",
    "my_batches",
    "optimizer_tensors",
    "started",
    "state",
    "train",
    "weights",
]


def train(engine: Engine, steps: Iterable[int], *, masked: bool = True) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step.

    Args:
        masked: whether a third of the labels has no loss.
    """
    told = []
    for step in steps:
        batches = my_batches(engine.runtime, step)
        for batch in batches if not masked else ():
            del batch["loss_mask"]
        loss = engine.forward_backward(batches, step=step).item()
        norm, applied = engine.update(OPTIM.lr, loss=loss)
        assert applied
        told.append((loss, norm))
    return told


def state(step: int, world_size: int = 1, updates: int | None = None) -> dict[str, Any]:
    """What the loop saves of itself.

    Args:
        updates: what the optimizer has counted; None: as many as steps.
    """
    updates = step if updates is None else updates
    return {"step": step, "samples": 8 * step, "tokens": 64 * step, "updates": updates, "world_size": world_size}


def weights(engine: Engine) -> dict[str, Tensor]:
    """The optimizer's fp32 weights."""
    return gather(engine, lambda _, piece: piece.master)


def optimizer_tensors(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """The optimizer's fp32 weights and what it keeps of each parameter."""
    kept = {"weights": weights(engine)}
    assert engine.optim is not None
    for moment in OPTIMIZERS[engine.optim.name].kinds:
        kept[moment] = gather(engine, lambda _, piece, key=moment: piece.inner.state[piece.master].get(key))
    return kept
