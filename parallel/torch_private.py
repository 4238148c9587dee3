"""All uses of PyTorch's private names, for which there is no public equivalent. A new version of PyTorch is tried with
the tests that reach them (tests/parallel/test_foreign_changes.py lists the uses). Imports torch only when a function is
called."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist


def default_store() -> "dist.Store":
    """The store of the default process group."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def ranks_of_groups() -> dict[str, list[int]]:
    """Name of each process group, as in the flight recorder -> its global ranks, sorted."""
    import torch.distributed as dist

    world = dist.distributed_c10d._world  # pyright: ignore[reportPrivateUsage]
    return {name: sorted(world.pg_group_ranks.get(group, {})) for group, name in world.pg_names.items()}


def flight_recorder_dump() -> str | bytes | None:
    """The flight recorder's collectives as JSON, without stack traces; None if this build has no recorder."""
    import torch

    calls = torch._C._distributed_c10d  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if hasattr(calls, name):
            return getattr(calls, name)(True, False)
    return None


def set_deterministic(on: bool) -> None:
    """torch.use_deterministic_algorithms, which also sets an option of torch's compiler and loads it for that. Where
    it is not loaded nothing is compiled, and every rank starts a second earlier."""
    import torch

    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(on)
    else:
        torch._C._set_deterministic_algorithms(on, warn_only=False)  # pyright: ignore[reportPrivateUsage]


def fake_store() -> Any:
    """The store for init_process_group("fake", ...): a world of any size in one process, whose collectives do
    nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the import registers the backend

    return FakeStore()
