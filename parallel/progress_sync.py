"""Synchronizes ranks during file operations that take each rank a different time, such as hashing a checkpoint.

The ranks run a collective every second. None of them waits in one collective for as long as the slowest file takes, and
the watchdog sees progress.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from parallel.first_found import first_found

SECONDS = 1.0
"""Interval of the collectives."""


class ProgressSync:
    """Args:
    device: device of the tensors in collectives.
    progress: called on every rank after each interval in which any rank has made progress.
    """

    def __init__(self, device: torch.device, progress: Callable[[], None]):
        self.device, self.progress = device, progress

    def run(self, work: Iterator[int]) -> Any:
        """Runs a generator that yields the number of bytes processed. Every rank calls this together. Returns what the
        generator of the lowest rank returned that did not return None, such as an error. A generator that hangs stalls
        all ranks; so the watchdog also treats generators that yield only zeros."""
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
        return first_found(result, self.device)
