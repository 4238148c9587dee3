"""Timers for work on a device and for whole optimizer steps."""

import time
from typing import Any, Self

import torch


class DeviceTimer:
    """`with timer: ...` measures the work that is launched inside; on a GPU with CUDA events, without synchronizing."""

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
        """Duration of the last measurement. On a GPU the host waits for that work to end."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]


class StepTimer:
    """Measures whole optimizer steps in seconds: loading data, forward, backward and the optimizer's kernels. What
    happens between `stop` and the next `start` (evaluation, checkpoints) is not counted.

    On a GPU the optimizer's kernels are still queued when the host reaches the end of a step. CUDA events therefore
    mark both ends. A step whose kernels are still running when the time is read counts the next time, so that the host
    does not wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._mean: float | None = None

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self._spans.append((self._started, self._now()))

    def read(self) -> float:
        """Mean duration of the steps since the last call; there must be at least one. On a GPU the first call waits for
        the last step, and one that finds no step ended gives the mean of the call before."""
        if self._device.type != "cuda":
            spans, self._spans = self._spans, []
            return sum(end - begin for begin, end in spans) / len(spans)
        if self._mean is None:
            self._spans[-1][1].synchronize()
        spans = [span for span in self._spans if span[1].query()]
        self._spans = self._spans[len(spans) :]  # steps end in order
        if spans:
            self._mean = sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 / len(spans)
        assert self._mean is not None
        return self._mean

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
