"""Times what can run the experts' products, on the shapes of the run."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.extensions import input_projections

BUDGET, REPETITIONS = 1.0, 7
"""Seconds of timed rounds after which no further one begins, and rounds at most."""


_LOG = logging.getLogger("switchyard")


class TooSlow(Exception):
    """There was no time for two rounds."""


@dataclass(frozen=True)
class Shapes:
    """What one rank's experts compute in a micro-batch."""

    rows: int
    hidden_size: int
    width: int
    experts: int
    activation: str
    bias: bool
    dtype: str
    """As torch calls it: float32, bfloat16."""


def measure(backends: Mapping[str, Callable[..., Tensor]], shapes: Shapes, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward pass; backends that fail are left out. Kernels are compiled before the clock
    starts, however long that takes. Timed rounds then alternate between the backends, and the fastest one of each
    backend counts: whatever else the machine computes only adds to it.

    Raises:
        TooSlow: shapes too large, or a machine too busy, to say anything in this time.
    """
    steps = {name: _step(backend, shapes, device) for name, backend in backends.items()}

    def run(name: str, what: Callable[[], Any]) -> Any:
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


def _timed(step: Callable[[int], None], repetition: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step(repetition)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _counts(shapes: Shapes, repetition: int) -> list[int]:
    """Rows of each expert, as uneven as a trained router leaves them, shares between a half and one and a half of the
    mean, and as never before: a kernel built for one row count alone is no use at the next step."""
    share_L = torch.linspace(0.5, 1.5, shapes.experts) ** (1 + repetition / 16)
    ends = (share_L.cumsum(0) / share_L.sum() * shapes.rows).round().to(torch.int64)
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _step(backend: Callable[..., Tensor], shapes: Shapes, device: torch.device) -> Callable[[int], None]:
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, shapes.dtype)
    gates = input_projections(shapes.activation)
    sizes = {
        "x": (shapes.rows, shapes.hidden_size),
        "w_in": (shapes.experts, shapes.hidden_size, gates, shapes.width),
        "w_out": (shapes.experts, shapes.width, shapes.hidden_size),
        "b_in": (shapes.experts, gates, shapes.width),
    }
    drawn = {
        k: torch.rand(s, generator=generator).sub_(0.5).to(device, dtype).requires_grad_() for k, s in sizes.items()
    }

    def step(repetition: int) -> None:
        counts = _counts(shapes, repetition)
        bias = drawn["b_in"] if shapes.bias else None
        y = backend(drawn["x"], counts, drawn["w_in"], drawn["w_out"], shapes.activation, bias, None)
        y.backward(y.detach())

    return step
