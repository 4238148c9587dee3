"""Records a torch.profiler trace of some training steps."""

from pathlib import Path

import torch


class Profiler:
    """Traces steps a to b of `train.profile=[a, b]` into a file that chrome://tracing and Perfetto open.

    Args:
        steps: [a, b], both included; None traces nothing.
        enabled: whether this rank records a trace.
    """

    def __init__(self, steps: list[int] | None, directory: Path, *, enabled: bool):
        self.steps = steps if enabled else None
        self.directory = directory
        self._running: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        if self.steps and self.steps[0] <= step <= self.steps[1] and self._running is None:
            self._first = step
            self._running = torch.profiler.profile(record_shapes=True)
            self._running.start()

    def after(self, step: int) -> None:
        if self._running is not None and self.steps and step >= self.steps[1]:
            self._running.stop()
            self.directory.mkdir(exist_ok=True)
            self._running.export_chrome_trace(str(self.directory / f"steps_{self._first}_to_{step}.json.gz"))
            self._running = None
