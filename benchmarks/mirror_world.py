"""One real rank in a world of any size: a process group backend whose other ranks do what this one does.

torch's own fake backend leaves the results of collectives as they were, so that gathered objects cannot be read and
gathered sizes do not fit. Here a sum is this rank's value times the number of ranks, a gather is that many copies, and
what another stage would send is zeros. Everything that a rank does by itself runs as in a real world of that size; the
messages are counted.
"""

import datetime
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.host_staged_gloo import PythonGroup

BACKEND = "mirror"


@dataclass
class Traffic:
    """What went through the process groups since the last `clear`."""

    messages: Counter[str] = field(default_factory=Counter)
    """Name of the group -> collectives and point-to-point messages."""
    received: Counter[str] = field(default_factory=Counter)
    """Name of the group -> bytes that this rank receives."""

    def add(self, group: "MirrorGroup", received: int) -> None:
        self.messages[group.group_name] += 1
        self.received[group.group_name] += received

    def clear(self) -> None:
        self.messages.clear()
        self.received.clear()


TRAFFIC = Traffic()


class _Done:
    """The work handle of an operation that has completed."""

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


class MirrorGroup(PythonGroup):
    """A process group whose other ranks all send what this rank sends."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta):
        super().__init__(rank, size)

    def _reduce(self, tensor: Tensor, options: Any) -> None:
        if options is None or options.reduceOp == dist.ReduceOp.SUM:
            tensor.mul_(self.size())

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        for tensor in tensors:
            self._reduce(tensor, options)
        return self._done(tensors)

    def reduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        return self.allreduce(tensors, options)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> Any:
        return self._done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Any:
        for of_ranks, mine in zip(outputs, inputs, strict=True):
            for one in of_ranks:
                one.copy_(mine)
        return self._done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Any:
        return self.allgather(outputs, inputs, options) if outputs else self._done([])

    def all_gather_single(self, output: Tensor, mine: Tensor, options: Any = None) -> Any:
        output.view(self.size(), -1).copy_(mine.detach().clone().view(1, -1))  # it may be a part of the output
        return self._done(output)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            output.view(self.size(), -1).copy_(mine.detach().clone().view(1, -1))  # it may be a part of the output
        return self._done(outputs)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [whole], options)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> Any:
        for output, whole in zip(outputs, inputs, strict=True):
            output.view(-1).copy_(whole.view(self.size(), -1)[self.rank()])
            self._reduce(output, options)
        return self._done(outputs)

    def all_to_all_single(
        self, output: Tensor, mine: Tensor, receive: list[int], send: list[int], options: Any = None
    ) -> Any:
        sent = (mine.split(send) if send else mine.chunk(self.size()))[self.rank()].flatten()
        # Each rank sends what this rank has for itself, as often as there is room: rows come back that never left.
        copies = -(-output.numel() // max(1, sent.numel()))
        output.view(-1).copy_(sent.repeat(copies)[: output.numel()]) if sent.numel() else output.zero_()
        return self._done(output)

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self._done([])

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        for tensor in tensors:
            tensor.detach().zero_()
        return self._done(tensors)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self._done([])

    def _done(self, received: Any) -> _Done:
        TRAFFIC.add(self, _bytes(received))
        return _Done()

    def getBackendName(self) -> str:
        return BACKEND


# The same operations before torch 2.13.
for _old, _new in {
    "allreduce_coalesced": "allreduce",
    "_allgather_base": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "alltoall_base": "all_to_all_single",
}.items():
    setattr(MirrorGroup, _old, getattr(MirrorGroup, _new))


@contextmanager
def mirrored() -> Generator[Traffic]:
    """Inside, parallel.process_groups starts a rank of a mirror world, on the CPU."""
    from parallel import process_groups

    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, MirrorGroup, devices=["cpu"])
    picked = process_groups.pick_device
    process_groups.pick_device = lambda world: (torch.device("cpu"), BACKEND)
    try:
        yield TRAFFIC
    finally:
        process_groups.pick_device = picked


STORE_REQUESTS = ("set", "get", "add", "wait", "check", "compare_set", "multi_get", "multi_set", "delete_key")


@contextmanager
def counted_requests() -> Generator[Counter[str]]:
    """Inside, the requests that Python code of this process sends to any store are counted, by their names."""
    asked: Counter[str] = Counter()
    originals = {name: getattr(dist.Store, name) for name in STORE_REQUESTS}

    def counting(name: str) -> Callable[..., Any]:
        def request(store: dist.Store, *args: Any) -> Any:
            asked[name] += 1
            return originals[name](store, *args)

        return request

    for name in STORE_REQUESTS:
        setattr(dist.Store, name, counting(name))
    try:
        yield asked
    finally:
        for name, original in originals.items():
            setattr(dist.Store, name, original)
