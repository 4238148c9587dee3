"""What can go wrong while a run goes on: signals that ask it to stop, and updates that are not finite."""

import signal
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # the command is to answer a wrong setting before PyTorch is loaded
    import torch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GO_ON, STOP, FAIL, LEAVE = 0, 1, 2, 3
"""What the ranks agree on after a step: the next one; an end with a checkpoint; a failure, with a checkpoint if there
is room for one; an end without writing anything."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why. Exit code 1."""


class TakenOver(RunFailed):
    """Another process goes on in the run directory, so this one must not write there any more."""


class StopRequest:
    """While entered, a signal that asks for an end is remembered instead of obeyed, so that the step in progress can
    be finished and a checkpoint written. A second Ctrl-C interrupts at once.

    Args:
        signals: those to remember.
        received: the name of one that came earlier.
    """

    def __init__(self, signals: Iterable[int] = STOP_SIGNALS, received: str | None = None) -> None:
        self.received = received
        self._signals = tuple(signals)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    @property
    def reason(self) -> str:
        return self.received or "a signal to another rank"

    def agreed(self, device: "torch.device", *, fail: bool = False, leave: bool = False) -> int:
        """GO_ON, STOP when any rank was asked to stop, FAIL when one cannot go on, LEAVE when one has to. Every rank
        calls this after every step, so all stop after the same."""
        import torch
        import torch.distributed as dist

        mine = LEAVE if leave else FAIL if fail else STOP if self.received is not None else GO_ON
        if dist.get_world_size() == 1:
            return mine
        all_of_us = torch.tensor([mine], dtype=torch.int32, device=device)
        dist.all_reduce(all_of_us, op=dist.ReduceOp.MAX)
        return int(all_of_us.item())


class SkipCounter:
    """Counts updates that were left out because the loss or a gradient was not finite.

    Args:
        limit: how many in a row end the run.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_row = 0
        self.total = 0

    def applied(self) -> None:
        self.in_row = 0

    def skipped(self, step: int, culprits: list[str]) -> str:
        """Counts one and says it in a sentence.

        Raises:
            RunFailed: it was one too many in a row.
        """
        self.in_row += 1
        self.total += 1
        named = ", ".join(culprits) or "loss"
        message = f"step {step}: update skipped, not finite: {named} ({self.in_row} in a row, {self.limit} allowed)"
        if self.in_row > self.limit:
            raise RunFailed(f"{message}. The newest checkpoint is untouched; lower optim.lr or raise guard.max_skipped")
        return message
