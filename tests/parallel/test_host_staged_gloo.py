"""Messages through host memory: each operation against gloo itself, and whole training steps. That a CPU's tensors lie
on a device is pretended: gloo must never see one of them, only copies."""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.parity import MATRIX, VARIANTS, Outcome, deviations, measure
from conf.schema import ParallelConfig
from parallel import host_staged_gloo
from parallel import process_groups as runtimes
from parallel.env import World
from tests.parallel.helpers import started


def drawn(world: World, *shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(world.rank)).float()


def gathered_list(world: World) -> list[Tensor]:
    parts = [torch.zeros(3) for _ in range(world.size)]
    dist.all_gather(parts, drawn(world, 3))
    return parts


def scattered_list(world: World) -> Tensor:
    out = torch.zeros(2)
    dist.reduce_scatter(out, [drawn(world, world.size, 2)[r].clone() for r in range(world.size)])
    return out


def uneven(world: World) -> Tensor:
    send = [r + world.rank for r in range(world.size)]
    receive = [world.rank + r for r in range(world.size)]
    out = torch.zeros(sum(receive), 2)
    dist.all_to_all_single(out, drawn(world, sum(send), 2), receive, send)
    return out


def asynchronous(world: World) -> list[Tensor]:
    """Two that are under way at once; what arrives is there once it was waited for."""
    a, b, c = drawn(world, 4), torch.zeros(2), torch.zeros(world.size)
    dist.all_gather_into_tensor(c, drawn(world, 1))
    works = [
        dist.all_reduce(a, async_op=True),
        dist.reduce_scatter_tensor(b, drawn(world, 2 * world.size), async_op=True),
    ]
    for work in works:
        work.wait()
    return [a, b, c]


def coalesced(world: World) -> list[Tensor]:
    a, b = torch.zeros(2, world.size), torch.zeros(2, 3)
    c = drawn(world, 2, 3)
    with dist._coalescing_manager():
        for row in range(2):
            dist.all_gather_into_tensor(a[row], drawn(world, 1))
    with dist._coalescing_manager(async_ops=True) as under_way:
        for row in range(2):
            dist.reduce_scatter_tensor(b[row], drawn(world, 3 * world.size))
    under_way.wait()
    with dist._coalescing_manager():
        for row in range(2):
            dist.all_reduce(c[row])
    return [a, b, c]


def ring(world: World) -> list[Tensor]:
    """Sends that nobody waits for before the receives, as between pipeline stages; then the blocking kind."""
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    got, again = torch.zeros(3), torch.zeros(3)
    sends, receives = dist.isend(drawn(world, 3), right), dist.irecv(got, left)
    receives.wait()
    sends.wait()
    if world.rank == 0:
        dist.send(got, 1)
    elif world.rank == 1:
        dist.recv(again)  # from anybody
    return [got, again]


def to_one(world: World) -> list[Tensor]:
    total, part = drawn(world, 3), torch.zeros(2)
    dist.reduce(total, dst=1)
    parts = [torch.zeros(3) for _ in range(world.size)] if world.rank == 0 else None
    dist.gather(drawn(world, 3), parts, dst=0)
    whole = [drawn(world, 2) + r for r in range(world.size)] if world.rank == 1 else None
    dist.scatter(part, whole, src=1)
    # Of a reduction the other ranks keep whatever.
    return [total if world.rank == 1 else torch.zeros(3), part, *(parts or [])]


def in_place(world: World) -> list[Tensor]:
    a, b, strided = drawn(world, 3), drawn(world, 3), drawn(world, 3, 4).t()
    dist.broadcast(a, src=1)
    dist.all_reduce(b, op=dist.ReduceOp.MAX)
    dist.all_reduce(strided[1:3, 0])  # neither contiguous nor the whole of its memory
    objects: list = [None] * world.size
    dist.all_gather_object(objects, world.rank)
    dist.barrier()
    return [a, b, strided, torch.tensor(objects)]


OPERATIONS: list[Callable] = [gathered_list, scattered_list, uneven, asynchronous, coalesced, ring, to_one, in_place]


@contextmanager
def pretending() -> "object":
    """Every tensor is on a device, and gloo may see copies alone. Yields the names of the operations that were asked
    for."""
    devices: set[int] = set()
    asked: set[str] = set()
    originals = host_staged_gloo.on_device, host_staged_gloo._on_host, runtimes.pick_device

    def on_device(tensor: Tensor) -> bool:
        devices.add(tensor.data_ptr())
        return True

    def on_host(arg, copies):
        host = originals[1](arg, copies)
        assert not {id(t) for t in host_staged_gloo._tensors(arg)} & {id(t) for t in host_staged_gloo._tensors(host)}
        return host

    class Recorded(host_staged_gloo.StagedGroup):
        def __getattribute__(self, name: str):
            if name in host_staged_gloo.RESULTS:
                asked.add(name)
            return super().__getattribute__(name)

    host_staged_gloo.on_device, host_staged_gloo._on_host = on_device, on_host
    runtimes.pick_device = lambda world: (torch.device("cpu"), host_staged_gloo.BACKEND)
    dist.Backend._plugins.pop(host_staged_gloo.BACKEND.upper(), None)
    dist.Backend.register_backend(host_staged_gloo.BACKEND, Recorded, devices=["cpu", "cuda"])
    try:
        yield asked
    finally:
        host_staged_gloo.on_device, host_staged_gloo._on_host, runtimes.pick_device = originals
        dist.Backend.register_backend(host_staged_gloo.BACKEND, host_staged_gloo.StagedGroup, devices=["cpu", "cuda"])


def plain(world: World) -> list:
    with started(world, ParallelConfig()):
        return [operation(world) for operation in OPERATIONS]


def staged(world: World) -> tuple[list, set[str]]:
    """The results, and which operations were staged."""
    with pretending() as asked, started(world, ParallelConfig()):
        return [operation(world) for operation in OPERATIONS], asked


def test_every_operation_is_gloos(ranks):
    asked = set()
    wanted_by_rank = ranks.run(3, plain, timeout=120)
    for wanted, (got, names) in zip(wanted_by_rank, ranks.run(3, staged, timeout=120), strict=True):
        asked |= names
        for operation, one, other in zip(OPERATIONS, wanted, got, strict=True):
            one, other = ([t] if isinstance(t, Tensor) else t for t in (one, other))
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), operation.__name__
    unused = set(host_staged_gloo.RESULTS) - asked
    # This version of torch asks by the newer of two names for the same.
    older = {"_allgather_base", "_reduce_scatter_base", "alltoall_base"}
    older |= {"allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"}
    newer = {n for n in host_staged_gloo.RESULTS if n.removesuffix("_coalesced").endswith("single")}
    assert unused in (older, newer, set()), unused


def measure_staged(world: World, parallel: ParallelConfig, names: list[str]) -> tuple[dict[str, Outcome], set[str]]:
    with pretending() as asked:
        return measure(world, parallel, {name: VARIANTS[name] for name in names}), asked


@pytest.mark.parametrize("name", ["tp2 pp2 ep2", "cp2 dp2 +overlap"])
def test_training_is_the_same(ranks, name):
    layouts = next(layouts for layouts in MATRIX if layouts.name == name)
    parallel, variants = ParallelConfig(**layouts.degrees), layouts.variants[:1]
    plain = ranks.run(layouts.ranks, measure, parallel, {v: VARIANTS[v] for v in variants}, timeout=120)[0]
    staged, asked = ranks.run(layouts.ranks, measure_staged, parallel, variants, timeout=120)[0]
    assert max(deviations(staged[variants[0]], plain[variants[0]]).values()) == 0
    assert len(asked) >= 4
