"""Starts and stops the ranks of a run: who am I, which device, which process groups."""

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
    """The process groups that the layers and the loop use, passed explicitly rather than fetched from globals."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    """Same model part, other sequences."""
    dp_cp: dist.ProcessGroup
    """Same model part, other tokens."""
    tp_cp: dist.ProcessGroup
    """Ranks that share one micro-batch, in sequence order (tp fastest) when the sequence is cut over both."""
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup
    """Same experts, other tokens."""
    embedding: dist.ProcessGroup | None
    """The first and the last pipeline stage, over which Megatron-Core sums the gradients of tied embeddings; None on
    the stages between."""
    world: dist.ProcessGroup

    def __iter__(self):
        """The groups that this rank belongs to."""
        return (group for f in fields(self) if (group := getattr(self, f.name)) is not None)


@dataclass(frozen=True)
class Runtime:
    """What `start` set up."""

    world: World
    layout: Layout
    groups: Groups
    device: torch.device
    backend: str
    """What carries the messages: nccl, gloo, or gloo through host memory (parallel.host_staged_gloo)."""
    memory: tuple[str, str] | None = None
    """What the C library does with freed memory, and why; None on a GPU, whose allocator is torch's."""


def pick_device(world: World) -> tuple[torch.device, str]:
    """(this rank's GPU, or the CPU where there is none; the backend). Simulated ranks may share GPUs.

    Raises:
        ValueError: fewer GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    gpus = torch.cuda.device_count()
    if gpus == 1 and "SLURM_GPUS_PER_TASK" in os.environ and not world.simulated:
        return torch.device("cuda", 0), "nccl"  # Slurm shows every task its own GPU alone
    if world.local_size <= gpus:
        return torch.device("cuda", world.local_rank), "nccl"
    if world.simulated:
        return torch.device("cuda", world.local_rank % gpus), host_staged_gloo.BACKEND
    raise ValueError(
        f"{world.local_size} ranks on this machine but {gpus} GPU(s): one rank needs one GPU. Start fewer ranks, "
        f"or simulate them, sharing what there is, with NPROC={world.local_size} bash launch/train.sh"
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
    """Joins the process group, builds every Megatron-Core group of the layout and sends one message through each, so
    that a broken link shows here and not in the first optimizer step.

    Args:
        timeout: seconds that a rank waits for the others.
        threads: CPU threads of this rank; None: what threads_per_rank says.
        backend: None: what pick_device says.
        store: of the ranks; None: they meet here.

    Raises:
        RendezvousError: they did not meet within the time limit.
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
    # One rank alone needs no port.
    store = store or (dist.HashStore() if world.size == 1 else rendezvous.join(world, timeout))
    if backend == host_staged_gloo.BACKEND:
        host_staged_gloo.register()
    if world.simulated and (loopback := _loopback()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # not on a network that others can reach
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
        distributed_timeout_minutes=wait.total_seconds() / 60,
        create_gloo_process_groups=False,
    )
    return Groups(
        tp=ps.get_tensor_model_parallel_group(),
        cp=ps.get_context_parallel_group(),
        pp=ps.get_pipeline_model_parallel_group(),
        dp=ps.get_data_parallel_group(),
        dp_cp=ps.get_data_parallel_group(with_context_parallel=True),
        tp_cp=ps.get_tensor_and_context_parallel_group(),
        ep=ps.get_expert_model_parallel_group(),
        etp=ps.get_expert_tensor_parallel_group(),
        edp=ps.get_expert_data_parallel_group(),
        embedding=ps.get_embedding_group(check_initialized=False),
        world=dist.group.WORLD,
    )


def _warm_up(groups: Groups, device: torch.device) -> None:
    for group in groups:
        one = torch.ones(1, device=device)
        dist.all_reduce(one, group=group)
        assert one.item() == group.size()


def seed_all(seed: int) -> None:
    """Seeds every generator that a library might draw from. The model's own draws (weights, routing) do not depend on
    these: they are keyed by name and position."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leaves the process groups; a later `start` in the same process is possible."""
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
