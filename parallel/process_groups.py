"""Initializes and destroys the process groups of a run, and selects the device of each rank."""

import datetime
import os
import random
import socket
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from parallel import allocator, host_staged_gloo, megatron_compat, rendezvous
from parallel.env import World
from parallel.layout import Layout
from parallel.threads import threads_per_rank


@dataclass(frozen=True)
class Groups:
    """The process groups of a layout. They are passed explicitly, not read from Megatron-Core's globals."""

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
    """The first and the last pipeline stage, over which Megatron-Core sums the gradients of tied embeddings; None on
    other stages."""
    world: dist.ProcessGroup

    def __iter__(self):
        """The groups that this rank belongs to."""
        found = (group for f in fields(self) if (group := getattr(self, f.name)) is not None)
        return iter(dict.fromkeys(found))  # with one optimizer instance, two have two names each


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
) -> Runtime:
    """Initializes torch.distributed and Megatron-Core's process groups, and runs one collective over each group, so
    that a broken link is detected here and not in the first optimizer step.

    Args:
        timeout: seconds that a rank waits for the others.
        threads: CPU threads of this rank; None: threads_per_rank.
        backend: None: the one that pick_device returns.
        store: the ranks' store, if they have met already; None: rendezvous here.

    Raises:
        RendezvousError: the rendezvous timed out.
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
    groups = _build_groups(layout, wait)
    _warm_up(groups, device)
    seed_all(seed)
    return Runtime(world, layout, groups, device, backend, memory)


def _loopback() -> str | None:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _build_groups(layout: Layout, wait: datetime.timedelta) -> Groups:
    from megatron.core import parallel_state as ps

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # A fraction too: it becomes a timedelta.
        distributed_timeout_minutes=wait.total_seconds() / 60,  # pyright: ignore[reportArgumentType]
        create_gloo_process_groups=False,
    )
    replicas = _build_instances(layout, wait) if layout.optimizer_instances > 1 else None
    embedding = ps.get_embedding_group(check_initialized=False)
    return Groups(
        tp=_made(ps.get_tensor_model_parallel_group()),
        cp=_made(ps.get_context_parallel_group()),
        pp=_made(ps.get_pipeline_model_parallel_group()),
        dp=_made(ps.get_data_parallel_group()),
        dp_cp=_made(ps.get_data_parallel_group(with_context_parallel=True)),
        tp_cp=_made(ps.get_tensor_and_context_parallel_group()),
        ep=_made(ps.get_expert_model_parallel_group()),
        etp=_made(ps.get_expert_tensor_parallel_group()),
        edp=_made(ps.get_expert_data_parallel_group()),
        optimizer_dp_cp=_made(ps.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)),
        optimizer_edp=_made(ps.get_expert_data_parallel_group(partial_expert_data_parallel=True)),
        optimizer_replicas=replicas,
        embedding=None if embedding is None else _made(embedding),
        world=_made(dist.group.WORLD),
    )


def _build_instances(layout: Layout, wait: datetime.timedelta) -> dist.ProcessGroup:
    """Makes the groups of several optimizer instances, and returns that of the ranks with the same shards.
    Megatron-Core's own function needs the einops package, and makes those of all ranks."""
    rank = dist.get_rank()
    members = layout.optimizer_group(rank, "cp", "dp"), layout.optimizer_group(rank, "edp")
    dense, experts, replicas = (
        _made(dist.new_group(ranks, timeout=wait, use_local_synchronization=True))
        for ranks in (*members, layout.optimizer_replicas(rank))
    )
    megatron_compat.set_instance_groups(dense, experts, replicas)
    return replicas


def _made(group: object) -> dist.ProcessGroup:
    """torch's functions may return a number, on a rank outside of the group."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def _warm_up(groups: Groups, device: torch.device) -> None:
    for group in groups:
        one = torch.ones(1, device=device)
        dist.all_reduce(one, group=group)
        assert one.item() == group.size()


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
