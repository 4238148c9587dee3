"""What the benchmarks measure of a contender: the bytes that autograd keeps, and the most that a step takes."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.output_redirect import redirect_output


@dataclass(frozen=True)
class Contender:
    step: Callable[[], None]
    """One repetition, everything included that training would pay for."""
    forward: Callable[[], Tensor]
    """The forward pass alone, whose kept tensors are counted."""


@dataclass(frozen=True)
class Result:
    seconds: float
    """Median of the repetitions."""
    kept_bytes: int
    """What the forward pass leaves behind for the backward pass, its output included."""


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass allocates and that are still held when it is over."""
    with _Allocations() as made:
        output = forward()
    held = sum(size for storage, size in made.storages.values() if not storage.expired())
    del output
    return held


class _Allocations(TorchDispatchMode):
    """Every storage that an operation returns, watched without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:  # neither a view nor in place
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_bytes(step: Callable[[], None]) -> int:
    """The most memory that a repetition had at a time, beyond what was there before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # else the profiler announces every start and end
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the engines say about themselves. Their imports belong inside."""
    redirection = redirect_output(0)
    try:
        yield
    finally:
        redirection.undo()


def table(results: dict[str, Result], unit: Callable[[float], str]) -> str:
    """One line per contender: its time in the caller's words, and what it keeps for backward."""
    return "\n".join(f"  {n:32} {unit(r.seconds):>20} {r.kept_bytes / 2**20:8.0f} MiB kept" for n, r in results.items())
