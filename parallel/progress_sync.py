"""Work on files that takes each rank another time, such as hashing a checkpoint: the ranks meet every second, so that
nobody waits in one collective for as long as the slowest file takes, and the watch sees that all of them get on."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 1.0
"""Between two meetings."""


class ProgressSync:
    """Args:
    device: where the ranks' collectives expect their tensors.
    progress: called on every rank after a round in which any rank got on.
    """

    def __init__(self, device: torch.device, progress: Callable[[], None]):
        self.device, self.progress = device, progress

    def run(self, work: Iterator[int]) -> list[Any]:
        """Runs a generator that yields the bytes of each piece that it has done. Every rank calls this together;
        returns what each rank's generator returned, by rank. A rank whose generator hangs keeps the others waiting,
        which is a stall; one that yields nothing but zeros everywhere as well."""
        result, over, done, seen = None, False, 0, -1
        while True:
            end = time.monotonic() + SECONDS
            while not over and time.monotonic() < end:
                try:
                    done += next(work)
                except StopIteration as stop:
                    result, over = stop.value, True
            met = torch.tensor([done, not over], dtype=torch.int64, device=self.device)
            dist.all_reduce(met)
            total, at_work = met.tolist()
            if total != seen:
                self.progress()
            seen = total
            if not at_work:
                break
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, result)
        return answers
