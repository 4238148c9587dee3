"""Evaluation: loss and bits per byte of held-out text."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from corpus.stream import ValidWindows, micro_batches
from parallel.engine import Batch
from training.builder import BuiltModel
from training.router_replay import ReplayedWindows, RoutingRecording


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation, the same on every rank."""

    loss: float
    """Mean cross-entropy in nats per token."""
    tokens: int
    bits_per_byte: float | None
    """Cross-entropy in bits over the UTF-8 bytes of the predicted tokens; None without a tokenizer."""

    def row(self, step: int) -> dict[str, Any]:
        return {"step": step, "val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}


def evaluate(
    built: BuiltModel,
    windows: ValidWindows | ReplayedWindows,
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
    train, groups = built.config.train, built.runtime.groups
    dp = groups.dp.size()
    # Micro-batches have the same windows for any number of ranks, since capacity is defined per micro-batch. The last
    # one is padded; padding does not count in capacity and load.
    micro, layout = train.micro_batch_size, built.runtime.layout
    most = max(1, train.global_batch_size // (micro * dp))
    per_batch = most * micro * dp
    needed = -(-len(windows) // per_batch)
    needed = needed if batches is None else min(batches, needed)
    if isinstance(windows, ReplayedWindows):
        windows.check(min(len(windows), needed * per_batch))
    nats, tokens = 0.0, 0
    text_bytes = torch.zeros(1, dtype=torch.float64, device=built.runtime.device)
    for i in range(needed):
        wanted = -(-(len(windows) - i * per_batch) // (micro * dp))
        if layout.vpp > 1:  # the interleaved schedule needs a multiple of the number of stages
            wanted = -(-wanted // layout.pp) * layout.pp
        batch = list(
            micro_batches(
                windows,
                first_sample=i * per_batch,
                micro_batch_size=micro,
                num_micro_batches=min(most, wanted),
                dp_rank=groups.dp.rank(),
                dp_size=dp,
            )
        )
        batch_nats, batch_tokens = built.engine.evaluate(batch, recording.recorder if recording else None)
        if recording:
            recording.add(batch)
        nats, tokens = nats + batch_nats, tokens + batch_tokens
        if byte_lengths is not None:
            text_bytes += sum(_bytes(b, byte_lengths) for b in batch)
    dist.all_reduce(text_bytes, group=groups.dp)
    bits = nats / math.log(2) / text_bytes.item() if byte_lengths is not None else None
    return EvalResult(nats / tokens, tokens, bits)


def _bytes(batch: Batch, byte_lengths: np.ndarray) -> float:
    lengths = byte_lengths[batch["labels"].numpy()]
    return float((lengths * batch["loss_mask"].numpy()).sum())
