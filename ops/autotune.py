"""Chooses among implementations by the time that they take on the run's shapes, and remembers the answer."""

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from ops.run_context import RunContext

BUDGET, REPETITIONS = 1.0, 7
"""Seconds of timed rounds after which no further one begins, and rounds at most."""
WORTH = 0.95
"""An implementation is taken for its speed when it needs at most this share of the default's time: a smaller difference
may be noise, and the default keeps less for the backward pass."""
_LOG = logging.getLogger("switchyard")

T = TypeVar("T")
Step = Callable[[int], None]
"""A forward and backward pass of the round of this number."""


class TooSlow(Exception):
    """There was no time for two rounds."""


class Memory(Protocol):
    """Keeps what was measured (training.measurements)."""

    def recall(self) -> str | None:
        """The implementation that this run has used so far."""
        ...

    def timings(
        self, key: Mapping[str, object], measure: Callable[[], dict[str, float]]
    ) -> tuple[dict[str, float], bool]:
        """(seconds by name, whether they were measured just now)."""
        ...


def choose(
    steps: Callable[[], dict[str, Step]],
    names: Sequence[str],
    default: tuple[str, str],
    context: RunContext,
    shapes: Mapping[str, object],
    memory: Memory,
) -> tuple[str, str, bool]:
    """(name, why, whether one failed). Implementations round differently, so a run keeps the one that it began with.

    Args:
        steps: makes what is timed, by name; called only if it is.
        default: (name, why) where nothing is measured.
        shapes: what the times depend on besides the machine.
    """
    ruled, why = default
    if context.config.train.deterministic:
        return ruled, f"{why}; not measured, since train.deterministic=true takes what the rule says", False
    if (kept := memory.recall()) is not None and kept in names:
        return kept, "as before in this run", False
    device = context.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.cpu.get_capabilities().get("cpu_name")
    machine = {"device": name or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        seconds, fresh = memory.timings(machine | {**shapes, "names": list(names)}, lambda: measure(steps(), device))
    except TooSlow as error:
        return ruled, f"by rule; not measured: {error}", False
    best = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    failed = [name for name in names if name not in seconds]
    times += "".join(f", {name} failed" for name in failed)
    if best != ruled and seconds[best] > WORTH * seconds.get(ruled, float("inf")):
        best, times = ruled, f"{times}; {ruled} is as fast, within noise"
    return best, f"measured{'' if fresh else ' before'}: {times}", bool(failed)


def measure(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Seconds of a step; what fails is left out. Kernels are compiled before the clock starts, however long that takes.
    Timed rounds then alternate, and the fastest one of each counts: whatever else the machine computes only adds to it.

    Raises:
        TooSlow: shapes too large, or a machine too busy, to say anything in this time.
    """

    def run(name: str, what: Callable[[], T]) -> T | None:
        try:
            return what()
        except Exception:
            if len(steps) == 1:
                raise
            _LOG.warning("the experts' backend %s failed while it was measured", name, exc_info=True)
            del steps[name]
            return None

    for name in list(steps):
        run(name, lambda name=name: [steps[name](repetition) for repetition in _untimed(device)])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for repetition in range(REPETITIONS):
        if repetition and time.perf_counter() - begin > BUDGET:
            break
        for name in list(steps):
            took = run(name, lambda name=name, repetition=repetition: _timed(steps[name], repetition, device))
            seconds[name] += [] if took is None else [took]
        if not repetition and time.perf_counter() - begin > BUDGET:
            raise TooSlow(f"a round takes more than {BUDGET:g} s")
    return {name: min(seconds[name]) for name in steps}


def _untimed(device: torch.device) -> Sequence[int]:
    """Rounds before the clock starts. On a GPU the row counts of every timed round, since Triton compiles a kernel anew
    for some of them and keeps it for the whole run; on a CPU others than these, since oneDNN builds a kernel for every
    new row count, which every step of the run pays for."""
    return range(REPETITIONS) if device.type == "cuda" else [REPETITIONS]


def _timed(step: Step, repetition: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step(repetition)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
