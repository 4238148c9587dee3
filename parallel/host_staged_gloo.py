"""Ranks that share one GPU. NCCL wants a GPU for each rank, and gloo knows few collectives on CUDA tensors; so here, in
one place, every collective and every message goes through host memory: copied there, exchanged by gloo, copied back
when it is waited for. For trying a layout on one GPU, not for speed."""

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"

# What torch.distributed asks of a process group, and which arguments come back changed. The names before torch 2.13
# (_allgather_base and so on) are those of the same operations.
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
    """Whether gloo has to be kept from a tensor."""
    return tensor.is_cuda


def to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class _Arrival:
    """A message under way; what arrives is copied to the device when it is waited for."""

    def __init__(self, work: Any, pairs: list[tuple[Tensor, Tensor]], sent: Any):
        self._work, self._pairs, self._sent = work, pairs, sent  # what is sent must outlive the sending

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if self._work is not None:
            self._work.wait(timeout) if timeout else self._work.wait()
        for device, host in self._pairs:
            device.data.copy_(host)  # unseen by autograd, as what a collective writes always is
        self._pairs = []
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _staged(name: str) -> Callable[..., Any]:
    """The operation of this name, through host memory where a tensor lies on a device."""

    def operation(self: "StagedGroup", *args: Any, **kwargs: Any) -> Any:
        copies: list[tuple[Tensor, Tensor]] = []
        hosts = [_on_host(arg, copies) for arg in args]
        if not copies:
            return getattr(self.inner, name)(*args, **kwargs)
        results = {id(t) for index in RESULTS[name] for t in _tensors(args[index])}
        work = getattr(self.inner, name)(*hosts, **kwargs)
        return _Arrival(work, [(device, host) for device, host in copies if id(device) in results], hosts)

    operation.__name__ = name
    return operation


def _on_host(arg: Any, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """An argument with its device tensors replaced by copies, of which the list takes note."""
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


class StagedGroup(dist.ProcessGroup):
    """A group of gloo's that takes tensors of any device."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta):
        super().__init__(rank, size)
        kind = dist.ProcessGroup.BackendType.GLOO
        self.inner = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        gloo._set_sequence_number_for_group()
        self.inner._set_default_backend(kind)
        self.inner._register_backend(torch.device("cpu"), kind, gloo)
        self._name = ""

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        # Of no tensors: with its options gloo would look for a device.
        return self.inner.allreduce([torch.zeros(1)])

    def getBackendName(self) -> str:
        return BACKEND

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]  # where objects are sent from


for _name in RESULTS:
    setattr(StagedGroup, _name, _staged(_name))


def register() -> None:
    """Makes "staged" known to torch.distributed."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])
