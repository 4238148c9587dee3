"""How long the device was at work on something."""

import time
from typing import Any, Self

import torch


class DeviceClock:
    """`with clock: ...` measures what was started inside. On a GPU by events on the stream, which cost no waiting."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._times = [0.0, 0.0]

    def __enter__(self) -> Self:
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        self._times[which] = time.perf_counter()

    def seconds(self) -> float:
        """Of the last time. On a GPU the work must be known to be over: a result of it has been read."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]
