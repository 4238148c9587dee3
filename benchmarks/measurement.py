"""What the benchmarks measure of an implementation: the bytes that autograd saves, and the peak memory of a step."""

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
class Implementation:
    step: Callable[[], None]
    """One repetition, with everything that training does."""
    forward: Callable[[], Tensor]
    """The forward pass alone, whose saved tensors are counted."""


@dataclass(frozen=True)
class Result:
    seconds: float
    """Median of the repetitions."""
    saved_bytes: int
    """Bytes that the forward pass saves for the backward pass, including its output."""


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass allocates and that are still allocated at its end."""
    with _Allocations() as made:
        output = forward()
    held = sum(size for storage, size in made.storages.values() if not storage.expired())
    del output
    return held


class _Allocations(TorchDispatchMode):
    """Weak references to every storage that an operation allocates."""

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
    """Peak memory of a repetition, beyond what was allocated before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # otherwise the profiler prints a message at every start and end
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
    """Suppresses messages of the frameworks. Import them inside of this context."""
    redirection = redirect_output(0)
    try:
        yield
    finally:
        redirection.undo()


def table(results: dict[str, Result], unit: Callable[[float], str]) -> str:
    """One line per implementation: its time, formatted by `unit`, and the memory that it saves for backward."""
    return "\n".join(
        f"  {n:32} {unit(r.seconds):>20} {r.saved_bytes / 2**20:8.0f} MiB saved" for n, r in results.items()
    )
