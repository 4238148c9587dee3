"""Which rank keeps the others waiting. Legend: R ranks."""

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

SLOW = 1.5
"""Times the median: a rank that takes so much longer is worth a line."""
LINES = 10
"""Logged lines in a row in which one rank must be slow before a person is told."""


@dataclass
class Stragglers:
    """Collects what a rank did with its time, and compares the ranks when a line is logged. Every rank has one and
    calls every method together with the others.

    A rank's own time is what it took to read its data and to go forward and backward, up to the moment where it waits
    for the other data-parallel ranks. Until then it has waited only for the ranks that share its replica (tensor,
    pipeline, context and expert parallelism): all of a slow replica look slow, and the slowest of them is named.
    """

    device: torch.device
    hosts: list[str] = field(init=False)
    """The node of each rank."""
    _own: float = 0.0
    _data: float = 0.0
    _steps: int = 0
    _suspect: tuple[int, int] = (-1, 0)
    """A rank and in how many lines in a row it was slow."""

    def __post_init__(self) -> None:
        self.hosts = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, os.uname().nodename)

    def add(self, *, data: float, compute: float) -> None:
        """A step's seconds."""
        self._own += data + compute
        self._data += data
        self._steps += 1

    def compare(self, memory_bytes: float) -> dict[str, float | int]:
        """The figures of metrics.jsonl since the last call, and the largest of the ranks' memory_bytes."""
        steps = max(self._steps, 1)
        mine = torch.tensor([self._own / steps, self._data / steps, memory_bytes], dtype=torch.float64)
        every_R3 = torch.empty(len(self.hosts), 3, dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(every_R3, mine.to(self.device).unsqueeze(0))
        self._own, self._data, self._steps = 0.0, 0.0, 0
        return figures(every_R3.cpu())

    def straggler_warning(self, row: dict[str, float | int]) -> str | None:
        """What a person should be told of a logged line: once, when one rank has been slow for LINES lines."""
        rank, own, middle = int(row["slowest_rank"]), row["slowest_seconds"], row["rank_seconds"]
        slow = len(self.hosts) > 1 and own > SLOW * middle
        lines = self._suspect[1] + 1 if slow and self._suspect[0] == rank else int(slow)
        self._suspect = (rank if slow else -1, lines)
        if lines != LINES:
            return None
        return (
            f"rank {rank} on {self.hosts[rank]} keeps the others waiting: {own:.3g} s a step where the median rank "
            f"takes {middle:.3g} s, {LINES} lines in a row"
        )


def figures(every_R3: Tensor) -> dict[str, float | int]:
    """[own seconds, seconds of it spent on data, memory] of each rank, in short."""
    own_R, data_R, memory_R = every_R3.unbind(1)
    slowest = int(own_R.argmax())
    return {
        "rank_seconds": own_R.median().item(),
        "slowest_seconds": own_R[slowest].item(),
        "slowest_rank": slowest,
        "data_seconds": data_R.max().item(),
        "memory_bytes": int(memory_R.max()),
    }
