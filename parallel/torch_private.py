"""What is called of PyTorch although its name is private: nothing public gives the same. In one place, so that a new
version of PyTorch is tried here first (tests/parallel/test_torch_private.py). Imports torch only when something is
asked for: a login node imports this module too."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist


def default_store() -> "dist.Store":
    """The store over which the ranks of the default process group met."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def ranks_of_groups() -> dict[str, list[int]]:
    """{name of a process group: its ranks in the world, sorted}, as the flight recorder names them."""
    import torch.distributed as dist

    world = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks.get(group, {})) for group, name in world.pg_names.items()}


def flight_recorder_dump() -> str | bytes | None:
    """The flight recorder's collectives as JSON, without stacks; None where this build has no recorder."""
    import torch

    calls = torch._C._distributed_c10d
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if hasattr(calls, name):
            return getattr(calls, name)(True, False)
    return None


def fake_store() -> Any:
    """For init_process_group("fake", ...): a world of any size in one process, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the import makes the backend known

    return FakeStore()
