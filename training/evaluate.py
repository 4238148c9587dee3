"""Evaluation: loss and bits per byte of held-out text."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from corpus.stream import BatchShard, HeldOut
from parallel.engine import Batch
from training.builder import BuiltModel
from training.metrics import PART_LOSS
from training.router_replay import ReplayedWindows, RoutingRecording


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation, the same on every rank."""

    loss: float
    """Mean cross-entropy in nats per token, weighted as the tokens are; or the objective's mean loss."""
    tokens: float
    """Sum of the weights of the predicted tokens: their number, except for conversations with other weights. Or the
    number of prompts."""
    bits_per_byte: float | None
    """Cross-entropy in bits over the UTF-8 bytes of the predicted tokens; None without a tokenizer and for
    preferences."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means of the objective's metrics."""
    parts: dict[str, float] = field(default_factory=dict)
    """The loss of each part of a blend, by its name."""

    def row(self, step: int) -> dict[str, Any]:
        further = {f"val_{name}": value for name, value in self.metrics.items()}
        further |= {f"{PART_LOSS}{name}": loss for name, loss in self.parts.items()}
        return {"step": step, "val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte, **further}


def evaluate(
    built: BuiltModel,
    windows: HeldOut,
    byte_lengths: np.ndarray | None,
    *,
    batches: int | None,
    recording: RoutingRecording | None = None,
) -> EvalResult:
    """Every rank calls this together.

    Args:
        byte_lengths: UTF-8 bytes of each token id [V]; None where the text is not known.
        batches: global batches from the start of the held-out text; None: all of it.
        recording: collects what the routers choose.

    Raises:
        ValueError: windows have a recorded routing that is not theirs.
    """
    if built.engine.objective is not None:
        return _evaluate_objective(built, windows, batches)
    nats, tokens = 0.0, 0.0
    text_bytes = torch.zeros(1, dtype=torch.float64, device=built.runtime.device)
    for _, batch in global_batches(built, windows, batches):
        batch_nats, batch_tokens = built.engine.evaluate(batch, recording.recorder if recording else None)
        if recording:
            recording.add(batch)
        nats, tokens = nats + batch_nats, tokens + batch_tokens
        if byte_lengths is not None:
            text_bytes += sum(_bytes(b, byte_lengths) for b in batch)
    dist.all_reduce(text_bytes, group=built.runtime.groups.dp)
    bits = nats / math.log(2) / text_bytes.item() if byte_lengths is not None else None
    return EvalResult(nats / tokens, tokens, bits)


def evaluate_parts(built: BuiltModel, parts: Mapping[str, HeldOut], *, batches: int | None) -> dict[str, float]:
    """The loss of each part's held-out text. Every rank calls this together; arguments as of `evaluate`."""
    return {name: evaluate(built, windows, None, batches=batches).loss for name, windows in parts.items()}


def _evaluate_objective(built: BuiltModel, windows: HeldOut, batches: int | None) -> EvalResult:
    sums, count = dict.fromkeys(("loss", *built.engine.objective.metrics), 0.0), 0
    for _, batch in global_batches(built, windows, batches):
        of_batch, prompts = built.engine.evaluate_objective(batch)
        sums, count = {name: sums[name] + value for name, value in of_batch.items()}, count + prompts
    means = {name: total / count for name, total in sums.items()}
    return EvalResult(means.pop("loss"), count, None, means)


def global_batches(built: BuiltModel, windows: HeldOut, batches: int | None) -> Iterator[tuple[int, list[Batch]]]:
    """(index of its first window, this rank's micro-batches) of each global batch, in the order of the windows.

    Args:
        batches: number of global batches; None: all.
    """
    shards = _shards(built, windows, batches)
    if isinstance(windows, ReplayedWindows) and shards:
        end = shards[-1].first_sample + shards[-1].num_micro_batches * _across(built)
        windows.check(min(len(windows), end))
    for shard in shards:
        shard.request(windows)
    for shard in shards:
        yield shard.first_sample, list(shard.micro_batches(windows))


def request_windows(built: BuiltModel, windows: HeldOut, batches: int | None) -> None:
    """Requests what `evaluate` with the same arguments will read on this rank, where that is in objects."""
    for shard in _shards(built, windows, batches):
        shard.request(windows)


def _across(built: BuiltModel) -> int:
    """Windows of a micro-batch over all data-parallel ranks."""
    return built.config.train.micro_batch_size * built.runtime.groups.dp.size()


def _shards(built: BuiltModel, windows: HeldOut, batches: int | None) -> list[BatchShard]:
    """What this rank reads of each global batch."""
    train, groups = built.config.train, built.runtime.groups
    # Micro-batches have the same windows for any number of ranks, since capacity is defined per micro-batch. The last
    # one is padded; padding does not count in capacity and load.
    across, layout = _across(built), built.runtime.layout
    most = max(1, train.global_batch_size // across)
    needed = -(-len(windows) // (most * across))
    shards: list[BatchShard] = []
    for i in range(needed if batches is None else min(batches, needed)):
        wanted = -(-(len(windows) - i * most * across) // across)
        if layout.vpp > 1:  # the interleaved schedule needs a multiple of the number of stages
            wanted = -(-wanted // layout.pp) * layout.pp
        shards.append(
            BatchShard(
                i * most * across,
                train.micro_batch_size,
                num_micro_batches=min(most, wanted),
                dp_rank=groups.dp.rank(),
                dp_size=groups.dp.size(),
            )
        )
    return shards


def _bytes(batch: Batch, byte_lengths: np.ndarray) -> float:
    lengths = byte_lengths[batch["labels"].numpy()]
    return float((lengths * batch["loss_mask"].numpy()).sum())
