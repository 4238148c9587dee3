"""Initializes and destroys the process groups of a run, and selects the device of each rank."""

import contextlib
import datetime
import os
import random
import socket
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from parallel import allocator, host_staged_gloo, megatron_compat, rendezvous
from parallel.env import World
from parallel.flight_recorder import format_ranks
from parallel.layout import Layout
from parallel.megatron_groups import set_parallel_state
from parallel.threads import threads_per_rank


@dataclass(frozen=True)
class Groups:
    """The process groups that a rank is a member of. They are passed explicitly, not read from Megatron-Core's
    globals."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    """Ranks with the same model shard and different sequences."""
    dp_cp: dist.ProcessGroup
    """Ranks with the same model shard and different tokens."""
    tp_cp: dist.ProcessGroup
    """Ranks that share a micro-batch, in sequence order (tp fastest) if the sequence is sharded over both."""
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup
    """Ranks with the same experts and different tokens."""
    optimizer_dp_cp: dist.ProcessGroup
    """Of dp_cp the ranks of this optimizer instance, over which gradients and optimizer states are sharded."""
    optimizer_edp: dist.ProcessGroup
    """Of edp the ranks of this optimizer instance."""
    optimizer_replicas: dist.ProcessGroup | None
    """The ranks with the same optimizer shards, of one instance each, over which these shards of the gradients are
    all-reduced; None: there is one instance."""
    embedding: dist.ProcessGroup | None
    """The first and the last pipeline stage, over which Megatron-Core sums the gradients of an embedding that both
    hold; None on other stages, and where the stages share no embedding."""
    world: dist.ProcessGroup
    amax: dist.ProcessGroup | None = None
    """The ranks of this pipeline stage, over which delayed scaling in FP8 reduces the largest magnitudes; None: nothing
    asks for it."""

    def named(self) -> Iterator[tuple[str, dist.ProcessGroup]]:
        """(kind, group) of the groups that this rank belongs to. A group can be of several kinds: those of one rank
        are all the same group."""
        return ((f.name, group) for f in fields(self) if (group := getattr(self, f.name)) is not None)


@dataclass(frozen=True)
class Runtime:
    """The distributed environment that `start` has set up."""

    world: World
    layout: Layout
    groups: Groups
    device: torch.device
    backend: str
    """nccl, gloo, or gloo through host memory (parallel.host_staged_gloo)."""
    memory: tuple[str, str] | None = None
    """(setting of malloc, reason) for the start table; None on a GPU."""


def pick_device(world: World) -> tuple[torch.device, str]:
    """(device, backend) of this rank: its GPU, or the CPU if there is none. Simulated ranks may share GPUs.

    Raises:
        ValueError: there are fewer GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    gpus = torch.cuda.device_count()
    if gpus == 1 and "SLURM_GPUS_PER_TASK" in os.environ and not world.simulated:
        return torch.device("cuda", 0), "nccl"  # with --gpus-per-task, a task sees only its own GPU
    if world.local_size <= gpus:
        return torch.device("cuda", world.local_rank), "nccl"
    if world.simulated:
        return torch.device("cuda", world.local_rank % gpus), host_staged_gloo.BACKEND
    raise ValueError(
        f"{world.local_size} ranks on this machine but {gpus} GPU(s): one rank needs one GPU. Start fewer ranks, "
        f"or simulate ranks that share GPUs with NPROC={world.local_size} bash launch/train.sh"
    )


def start(
    world: World,
    layout: Layout,
    *,
    seed: int,
    timeout: float,
    threads: int | None = None,
    backend: str | None = None,
    store: dist.Store | None = None,
    embedding: bool = True,
    amax: bool = False,
) -> Runtime:
    """Initializes torch.distributed and this rank's process groups, and runs one collective over each group, so that a
    broken link is detected here and not in the first optimizer step.

    Args:
        timeout: seconds that a rank waits for the others.
        threads: CPU threads of this rank; None: threads_per_rank.
        backend: None: the one that pick_device returns.
        store: the ranks' store, if they have met already; None: rendezvous here.
        embedding: whether the first and the last pipeline stage both hold the embedding.
        amax: whether there is a group of the ranks of each pipeline stage.

    Raises:
        RendezvousError: the rendezvous timed out.
        RuntimeError: a process group does not communicate; named in the message.
    """
    device, picked = pick_device(world)
    backend = backend or picked
    megatron_compat.load()
    torch.set_num_threads(threads or threads_per_rank(world.local_size))
    memory = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        memory = allocator.keep_freed_memory()
    wait = datetime.timedelta(seconds=timeout)
    # A single rank needs no port.
    store = store or (dist.HashStore() if world.size == 1 else rendezvous.join(world, timeout))
    if backend == host_staged_gloo.BACKEND:
        host_staged_gloo.register()
    if world.simulated and (loopback := _loopback()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # not reachable from the network
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=wait)
    groups = build_groups(layout, world.rank, wait, embedding=embedding, amax=amax)
    set_parallel_state(groups, layout)
    _warm_up(groups, device)
    seed_all(seed)
    return Runtime(world, layout, groups, device, backend, memory)


def _loopback() -> str | None:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


AXES = {
    "dp_cp": ("dp", "cp"),
    "dp": ("dp",),
    "tp_cp": ("tp", "cp"),
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "ep": ("ep",),
    "etp": ("etp",),
    "edp": ("edp",),
}
"""The kinds of groups, in the order in which every rank makes its group of each kind, and the axes that they span
(parallel/layout.py)."""
_SHARED = (("dp_cp", "dp"), ("tp_cp", "tp", "cp"), ("pp", "embedding"))
"""Kinds of which two with the same ranks are one group: their collectives follow each other in the same order on every
rank, and none of them overlaps with another's. Not so those of ep and tp, which the dispatch overlaps on purpose, or
those of dp and edp, whose buckets become ready in the order of each rank's own backward pass."""


def build_groups(
    layout: Layout, rank: int, wait: datetime.timedelta | None = None, *, embedding: bool, amax: bool = False
) -> Groups:
    """The groups of one rank. It makes only those that it is a member of, and their members alone take part.

    Nobody waits in a circle: every rank makes its groups in the order of `AXES`, and making one waits at most for its
    members. When all ranks have made the first n kinds, each goes on to kind n + 1, where all members of every group
    meet. Which kinds are one group is the same for all ranks, since the groups of a kind are the same pattern of ranks,
    shifted. torch names a group by its ranks and by how many groups a process has made: the members of a group have
    made equally many. Therefore the embedding group, which the stages between the first and the last do not make, is
    the last one.

    Args:
        wait: how long a rank waits for the others; None: torch's default.
        embedding: whether the first and the last stage both hold the embedding.
        amax: whether to make `Groups.amax`.
    """
    world = dist.group.WORLD
    assert world is not None
    made: dict[tuple[object, ...], dist.ProcessGroup] = {}

    def group(kind: str, ranks: list[int]) -> dist.ProcessGroup:
        if layout.world == 1:
            return world
        use = next((kinds for kinds in _SHARED if kind in kinds), kind)
        key = (use, *ranks) if len(ranks) > 1 else ()  # all groups of one rank are one
        if key not in made:
            new = dist.new_group(
                ranks, timeout=wait, use_local_synchronization=True, group_desc=kind if len(ranks) > 1 else "alone"
            )
            assert isinstance(new, dist.ProcessGroup)
            made[key] = new
        return made[key]

    groups = {kind: group(kind, layout.group(rank, *axes)) for kind, axes in AXES.items()}
    groups |= {"optimizer_dp_cp": groups["dp_cp"], "optimizer_edp": groups["edp"]}
    replicas = None
    if layout.optimizer_instances > 1:
        groups["optimizer_dp_cp"] = group("optimizer_dp_cp", layout.optimizer_group(rank, "dp", "cp"))
        groups["optimizer_edp"] = group("optimizer_edp", layout.optimizer_group(rank, "edp"))
        replicas = group("optimizer_replicas", layout.optimizer_replicas(rank))
    of_stage = group("amax", layout.group(rank, "tp", "cp", "dp")) if amax else None
    stages = layout.group(rank, "pp")
    ends = [stages[0], stages[-1]] if layout.pp > 1 else stages
    has_embedding = embedding and rank in ends
    return Groups(
        **groups,
        optimizer_replicas=replicas,
        embedding=group("embedding", ends) if has_embedding else None,
        world=world,
        amax=of_stage,
    )


def _warm_up(groups: Groups, device: torch.device) -> None:
    """One all-reduce over each group of several ranks, all under way at the same time.

    Raises:
        RuntimeError: one of them failed; names the group.
    """
    names: dict[dist.ProcessGroup, list[str]] = {}
    for name, group in groups.named():
        if group.size() > 1:
            names.setdefault(group, []).append(name)
    started = []
    for group, kinds in names.items():
        one = torch.ones(1, device=device)
        with _naming(kinds, group):
            started.append((kinds, group, one, dist.all_reduce(one, group=group, async_op=True)))
    for kinds, group, one, work in started:
        with _naming(kinds, group):
            assert work is not None
            work.wait()
            assert one.item() == group.size()


@contextlib.contextmanager
def _naming(kinds: list[str], group: dist.ProcessGroup) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks = format_ranks(dist.get_process_group_ranks(group))
        raise RuntimeError(
            f"the first message through the process group {'/'.join(kinds)} ({ranks}) failed: {error}"
        ) from error


def seed_all(seed: int) -> None:
    """Seeds the random number generators of Python, NumPy, PyTorch and Megatron-Core. Initial weights and routing do
    not depend on them: their random numbers are hashes of names and positions."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Destroys the process groups. `start` may be called again in the same process."""
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
