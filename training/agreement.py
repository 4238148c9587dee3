"""What the ranks agree on in every step: to go on, to stop, to fail or to leave."""

import time

import torch
from torch import Tensor

from conf.schema import Config
from corpus.prepare import Prepared
from parallel.collectives import sum_over_world
from parallel.process_groups import Runtime
from training.console import Console
from training.run_dir import RunDir
from training.signals import GO_ON, LEAVE, StopRequest
from training.storage import StorageFailure

LOOK_SECONDS = 10.0
"""Seconds from one look at the run directory to the next. It may be on storage that thousands of ranks share."""


class Agreement:
    """Every rank counts the states of all ranks (training.signals): each contributes its own to a sum that a step
    makes anyway, so that all stop after the same step. Rank 0 also looks at the run directory from time to time:
    whether it still exists, and whether another process has taken it over."""

    def __init__(
        self, runtime: Runtime, run_dir: RunDir, config: Config, prepared: Prepared, console: Console, stop: StopRequest
    ):
        """Raises ValueError: rank 0 cannot take over the run directory."""
        self.storage = StorageFailure(run_dir.path)
        self._runtime, self._run_dir, self._config, self._prepared = runtime, run_dir, config, prepared
        self._console, self._stop = console, stop
        self._owner = run_dir.take_over(prepared.tokenizer) if runtime.world.rank == 0 else None
        self._looked, self._lost = time.monotonic(), False

    def keep_settings(self) -> None:
        """Rank 0 records the settings of a run that has restored its checkpoint."""
        if self._owner:
            self._run_dir.keep_settings(self._owner, self._config, self._prepared)

    def counts(self, *, look: bool = False) -> Tensor:
        """1 for this rank's state and 0 for the others, fp64 [GO_ON to LEAVE], to be summed over the ranks.

        Args:
            look: look at the run directory now, because something important is about to be written there.
        """
        if self._owner:
            if self._console.log_error:
                self.storage.add(self._console.log_error)
            if look or time.monotonic() - self._looked >= LOOK_SECONDS:
                self._look()
        state = self._stop.state(fail=self.storage.message is not None, leave=self._lost)
        return torch.eye(LEAVE + 1, dtype=torch.float64)[state]

    def by_itself(self) -> int:
        """The most severe state of all ranks, by a collective of its own. Every rank calls this together, before the
        first step and at the end."""
        return severest(sum_over_world({"states": self.counts(look=True)}, self._runtime.device)["states"])

    def _look(self) -> None:
        self.storage.look_for_directory(self._take_over_again)
        assert self._owner is not None
        self._lost, self._looked = not self._owner.holds(), time.monotonic()

    def _take_over_again(self) -> None:
        self._owner = self._run_dir.take_over(self._prepared.tokenizer)
        self.keep_settings()


def severest(counts: Tensor) -> int:
    """The most severe of the states that any rank has."""
    return max((state for state, count in enumerate(counts.tolist()) if count), default=GO_ON)
