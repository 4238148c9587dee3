"""What the stages share: where they run, how they time, and how they write a result down."""

import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.gpu.day import append

REHEARSE = bool(os.environ.get("DAY_REHEARSE"))
"""Tiny shapes, on a CPU."""
DEVICE = torch.device("cpu" if REHEARSE else "cuda")

if REHEARSE and os.environ.get("TRITON_INTERPRET"):
    try:
        from tests.ops import interpreter
    except ImportError:  # without Triton the stages say so themselves
        pass
    else:
        interpreter.install()


def emit(what: str, **values: Any) -> None:
    """Appends one result of this stage to day.jsonl."""
    row = {"stage": os.environ["DAY_STAGE"], "what": what, **values}
    append(Path(os.environ["DAY_OUT"]) / "day.jsonl", row)
    print(row, flush=True)


def attempt(what: str, measure: Callable[[], Mapping[str, Any]]) -> bool:
    """Emits what `measure` returns, or why it failed: one result that cannot be had does not take the rest along."""
    try:
        emit(what, **measure())
    except Exception as error:
        traceback.print_exc()
        emit(what, error=in_a_line(error))
        return False
    return True


def in_a_line(error: Exception) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0][:300] if message else ''}"


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(steps: Mapping[str, Callable[[], object]], repetitions: int = 10, warm: int = 3) -> dict[str, float]:
    """Medians by name, taken in turns (A B A B ...) after `warm` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    warm, repetitions = (0, 1) if REHEARSE else (warm, repetitions)
    for repetition in range(warm + repetitions):
        for name, step in steps.items():
            synchronize()
            begin = time.perf_counter()
            if DEVICE.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                step()
                last.record()
                last.synchronize()
                took = first.elapsed_time(last) / 1e3
            else:
                step()
                took = time.perf_counter() - begin
            if repetition >= warm:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


def bf16(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).bfloat16()
