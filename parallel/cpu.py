"""Lets Megatron-Core run without CUDA, on CPU tensors and gloo, so that tests, laptops and CI execute the code that
clusters execute. Megatron-Core 0.16 names CUDA directly in some 300 places; the patches below cover those that
training meets. They are installed only where CUDA is absent, and `undo` takes every one of them back.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like"),
)


class _NoStream:
    """Stands for torch.cuda.Stream and torch.cuda.Event: a CPU has one queue, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _returning(True if name == "query" else None)


def _returning(value: Any) -> Callable[..., Any]:
    """A function that ignores its arguments; a new one for each name, since torch's compiler insists that no two of
    torch's names are the same function."""
    return lambda *args, **kwargs: value


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same factory with device="cuda" read as the CPU. A wrapper per factory costs far less than a
    TorchFunctionMode, which sits in the way of every torch call."""

    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return factory(*args, **kwargs)
        if device == "cuda" or getattr(device, "type", None) == "cuda":
            device = CPU
        return factory(*args, device=device, **kwargs)

    return make


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves out a collective in place over a single rank. NCCL does that by itself; gloo copies the whole bucket to
    another place and back."""

    @functools.wraps(collective)
    def call(output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, *args, group=group, **kwargs)

    return call


class CpuEngine:
    """The installed patches. `undo()` restores what was there; installing again is then possible."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def install(self) -> None:
        cuda = torch.cuda
        # Buffers and scalars are made on "the current device".
        self._set(cuda, "current_device", _returning(CPU))
        # Gradient buckets and point-to-point messages are ordered with streams and events; one CPU queue needs none.
        for name in ("Stream", "Event"):
            self._set(cuda, name, type(name, (_NoStream,), {}))
        for name in ("current_stream", "default_stream"):
            self._set(cuda, name, _returning(_NoStream()))
        self._set(cuda, "stream", _returning(contextlib.nullcontext()))
        for name in ("synchronize", "set_device", "empty_cache"):
            self._set(cuda, name, _returning(None))
        self._set(torch.Tensor, "record_stream", _returning(None))
        # Recompute asks whether a CUDA graph is being recorded.
        self._set(cuda, "is_current_stream_capturing", _returning(False))
        # The tensor-parallel random tracker saves and restores "the CUDA generator".
        self._set(cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state())
        self._set(cuda, "set_rng_state", lambda state, *a, **k: torch.set_rng_state(state))
        self._set(cuda, "manual_seed", torch.manual_seed)
        # `with torch.device(...)` knows the factories by identity, from the first time on: it is to know the real ones.
        _device_constructors()
        # Literal device="cuda" in the optimizer, the schedules and the loss.
        for name in FACTORIES:
            self._set(torch, name, _on_cpu(getattr(torch, name)))
        self._patch_megatron()

    def _patch_megatron(self) -> None:
        from megatron.core.distributed import param_and_grad_buffer as buffers
        from megatron.core.tensor_parallel import random

        for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
            self._set(buffers, name, _unless_alone(getattr(buffers, name)))
        # These two bind the default CUDA generator by index, past torch.cuda.get_rng_state.
        self._set(random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state())
        self._set(random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state))

    def undo(self) -> None:
        for owner, name, original in reversed(self._saved):
            setattr(owner, name, original)
        self._saved.clear()


_installed: CpuEngine | None = None


def install() -> CpuEngine | None:
    """Patches torch and Megatron-Core when CUDA is absent, once. Returns what was installed, or None with CUDA."""
    global _installed
    if torch.cuda.is_available():
        return None
    if _installed is None:
        _installed = CpuEngine()
        _installed.install()
    return _installed


def undo() -> None:
    """Takes the patches back, if there are any."""
    global _installed
    if _installed is not None:
        _installed.undo()
        _installed = None


@contextlib.contextmanager
def tensor_types_as_cuda() -> Iterator[None]:
    """While the optimizer is built: `tensor.type()` names the CUDA type, since Megatron-Core sorts parameters by
    strings such as 'torch.cuda.BFloat16Tensor'. A no-op with CUDA. Kept to the construction because other libraries
    read tensor.type() as well."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def named_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.")
        return result

    torch.Tensor.type = named_cuda
    try:
        yield
    finally:
        torch.Tensor.type = original


def import_megatron() -> ModuleType:
    """Imports Megatron-Core, quickly, and what the CPU patches need of it. Touches no device, so that a process which
    has called it can still be forked: a CUDA driver that was initialised before a fork is unusable after it."""
    compiler = torch.compile
    # Megatron-Core decorates layers that we do not use with torch.compile at import, which alone would load torch's
    # compiler: half of the import.
    torch.compile = lambda function=None, **options: function if function else lambda decorated: decorated
    try:
        import megatron.core
        from megatron.core.distributed import param_and_grad_buffer  # noqa: F401
        from megatron.core.tensor_parallel import random  # noqa: F401
    finally:
        torch.compile = compiler
    return megatron.core


def megatron() -> ModuleType:
    """Imports Megatron-Core and installs the CPU patches where they are needed. Called before anything else imports
    the engine; late, it only costs time."""
    core = import_megatron()
    install()
    return core
