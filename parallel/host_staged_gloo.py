"""A process group backend for ranks that share one GPU, for trying a layout, not for speed.

NCCL needs one GPU per rank, and gloo supports few collectives on CUDA tensors. This backend copies tensors to host
memory, communicates with gloo, and copies the results back in `wait`.
"""

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"

# The methods of a process group that torch.distributed calls, and the indices of the arguments that they write to.
# Names such as _allgather_base are those of the same operations before torch 2.13.
_FIRST = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "reduce_scatter", "gather", "scatter"),
    *("all_gather_single", "reduce_scatter_single", "all_to_all_single", "_allgather_base", "_reduce_scatter_base"),
    *("all_gather_single_coalesced", "reduce_scatter_single_coalesced", "allgather_into_tensor_coalesced"),
    *("reduce_scatter_tensor_coalesced", "alltoall_base", "recv", "recv_anysource"),
)
RESULTS: dict[str, tuple[int, ...]] = {
    name: results
    for name, results in {**dict.fromkeys(_FIRST, (0,)), "send": ()}.items()
    if hasattr(dist.ProcessGroup, name)
}


def on_device(tensor: Tensor) -> bool:
    """Whether a tensor must be staged through host memory."""
    return tensor.is_cuda


def to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class _StagedWork:
    """Work handle of a staged operation; `wait` copies the results to the device."""

    def __init__(self, work: Any, pairs: list[tuple[Tensor, Tensor]], sent: Any):
        self._work, self._pairs, self._sent = work, pairs, sent  # keeps the input alive until the work completes

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if self._work is not None:
            self._work.wait(timeout) if timeout else self._work.wait()
        for device, host in self._pairs:
            device.data.copy_(host)  # not recorded by autograd, as with any collective
        self._pairs = []
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _staged(name: str) -> Callable[..., Any]:
    """The operation of this name, staged through host memory for device tensors."""

    def operation(self: "StagedGroup", *args: Any, **kwargs: Any) -> Any:
        copies: list[tuple[Tensor, Tensor]] = []
        hosts = [_on_host(arg, copies) for arg in args]
        if not copies:
            return getattr(self.inner, name)(*args, **kwargs)
        results = {id(t) for index in RESULTS[name] for t in _tensors(args[index])}
        work = getattr(self.inner, name)(*hosts, **kwargs)
        return _StagedWork(work, [(device, host) for device, host in copies if id(device) in results], hosts)

    operation.__name__ = name
    return operation


def _on_host(arg: Any, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """The argument with its device tensors replaced by host copies; appends (device, host) to `copies`."""
    if isinstance(arg, Tensor):
        if not on_device(arg):
            return arg
        copies.append((arg, to_host(arg)))
        return copies[-1][1]
    return [_on_host(part, copies) for part in arg] if isinstance(arg, list | tuple) else arg


def _tensors(arg: Any) -> list[Tensor]:
    if isinstance(arg, Tensor):
        return [arg]
    return [t for part in arg for t in _tensors(part)] if isinstance(arg, list | tuple) else []


class PythonGroup(dist.ProcessGroup):
    """What torch.distributed asks of every process group that is written in Python."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]  # a base class's, which the stubs leave out
        self._name = ""

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]  # for object collectives


class StagedGroup(PythonGroup):
    """A gloo process group that accepts tensors on any device."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta):
        super().__init__(rank, size)
        kind = dist.ProcessGroup.BackendType.GLOO
        self.inner = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        gloo._set_sequence_number_for_group()
        self.inner._set_default_backend(kind)
        self.inner._register_backend(torch.device("cpu"), kind, gloo)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        # As an all-reduce on the host: gloo's barrier would select a device from the options.
        return self.inner.allreduce([torch.zeros(1)])

    def getBackendName(self) -> str:
        return BACKEND


for _name in RESULTS:
    setattr(StagedGroup, _name, _staged(_name))


def register() -> None:
    """Registers the backend "staged" with torch.distributed."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])
