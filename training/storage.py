"""What happens to a run whose directory cannot be written any more: rank 0 notices, all ranks write a checkpoint where
there is room for one, and the run ends with exit code 1 and one message."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from training.errors import RunFailed

_LOG = logging.getLogger(__name__)


class StorageFailure:
    """What has kept rank 0 from writing the run's files, if anything has."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.message: str | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """An OSError of the block is remembered instead of raised: one rank must not end alone."""
        try:
            yield
        except OSError as error:
            self.add(error)

    def add(self, error: OSError) -> None:
        _LOG.error("storage", exc_info=error)
        self.message = self.message or f"{error.filename or self._run_dir}: {error.strerror or error}"

    def look_for_directory(self, make_again: Callable[[], None]) -> None:
        """Where the run directory was deleted, calls `make_again`, so that a checkpoint can be kept."""
        try:
            self._run_dir.stat()
        except FileNotFoundError:
            self.message = f"{self._run_dir} was deleted or moved while the run went on"
            with contextlib.suppress(OSError, ValueError):
                self._run_dir.mkdir(parents=True)
                make_again()
        except OSError:  # a file system that hesitates
            pass

    def failed(self, step: int) -> RunFailed:
        """What ends the run, on every rank, after the checkpoint of `step` was written; of step 0 there is none."""
        kept = f"with a checkpoint of step {step}" if step else "before its first step"
        return RunFailed(
            f"{self.message or 'rank 0 cannot write the files of the run'}. The run ends {kept}; once the storage "
            f"works again, the same command with run.dir={self._run_dir} continues it"
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around the writing of a checkpoint, which fails on all ranks alike.

        Raises:
            RunFailed: it could not be written.
        """
        try:
            yield
        except ValueError as error:
            raise RunFailed(f"{self.message}; {error}" if self.message else str(error)) from None
