"""Detects ranks that slow down the others. Legend: R ranks."""

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SLOW = 1.5
"""A rank is slow if its time per step exceeds the median rank's by this factor."""
LINES = 10
"""Number of consecutive logged steps in which a rank must be slow before a warning."""


@dataclass
class Stragglers:
    """Measures the time of this rank per step and compares the ranks at every logged step. Every rank has an instance
    and calls every method together with the others.

    The time of a rank covers waiting for data, forward and backward, up to where it waits for other data-parallel
    ranks. Until then it waits only for the ranks of its replica (tensor, pipeline, context and expert parallelism): all
    ranks of a slow replica are slow, and the slowest of them is reported.
    """

    hosts: list[str] = field(init=False)
    """The node of each rank."""
    _own: float = 0.0
    _data: float = 0.0
    _steps: int = 0
    _suspect: tuple[int, int] = (-1, 0)
    """A rank and the number of consecutive logged steps in which it was slow."""

    def __post_init__(self) -> None:
        self.hosts = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, os.uname().nodename)

    def add(self, *, data: float, compute: float) -> None:
        """Adds the seconds of a step."""
        self._own += data + compute
        self._data += data
        self._steps += 1

    def local(self, memory_bytes: float) -> Tensor:
        """[seconds, seconds spent on data, memory_bytes] in this rank's row of fp64 [R, 3], and zeros in the others:
        summed over the ranks they are what `figures` takes. The seconds are those of a step, since the last call.

        It grows with the world, by 24 bytes a rank, because the median and the name of the slowest rank need them all:
        0.4 MB for 16,384 ranks, in a logged step alone.
        """
        steps = max(self._steps, 1)
        every_R3 = torch.zeros(len(self.hosts), 3, dtype=torch.float64)
        mine = [self._own / steps, self._data / steps, float(memory_bytes)]
        every_R3[dist.get_rank()] = torch.tensor(mine, dtype=torch.float64)
        self._own, self._data, self._steps = 0.0, 0.0, 0
        return every_R3

    def straggler_warning(self, row: Mapping[str, Any]) -> str | None:
        """A warning when a rank has been slow for exactly LINES logged steps in a row, else None."""
        rank, own, middle = int(row["slowest_rank"]), row["slowest_seconds"], row["rank_seconds"]
        slow = len(self.hosts) > 1 and own > SLOW * middle
        lines = self._suspect[1] + 1 if slow and self._suspect[0] == rank else int(slow)
        self._suspect = (rank if slow else -1, lines)
        if lines != LINES:
            return None
        return (
            f"rank {rank} on {self.hosts[rank]} slows down the others: {own:.3g} s per step, the median rank takes "
            f"{middle:.3g} s, in {LINES} consecutive logged steps"
        )


def figures(every_R3: Tensor) -> dict[str, float | int]:
    """Metrics from [seconds, seconds of waiting for data, bytes of memory] of each rank."""
    own_R, data_R, memory_R = every_R3.unbind(1)
    slowest = int(own_R.argmax())
    return {
        "rank_seconds": own_R.median().item(),
        "slowest_seconds": own_R[slowest].item(),
        "slowest_rank": slowest,
        "data_wait": data_R.max().item(),
        "memory_bytes": int(memory_R.max()),
    }


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
