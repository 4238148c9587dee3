"""Handles storage errors during a run: all ranks write a last checkpoint if possible, and the run ends with exit code 1
and one message."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from training.errors import RunFailed

_LOG = logging.getLogger(__name__)


class StorageFailure:
    """Records errors with which rank 0 failed to write the run's files."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.message: str | None = None

    @contextlib.contextmanager
    def recording_errors(self) -> Iterator[None]:
        """Records an OSError instead of raising it: no rank may end alone."""
        try:
            yield
        except OSError as error:
            self.add(error)

    def add(self, error: OSError) -> None:
        _LOG.error("storage", exc_info=error)
        self.message = self.message or f"{error.filename or self._run_dir}: {error.strerror or error}"

    def look_for_directory(self, make_again: Callable[[], None]) -> None:
        """If the run directory was deleted, creates it and calls `make_again`, so that a checkpoint can be written."""
        try:
            self._run_dir.stat()
        except FileNotFoundError:
            self.message = f"{self._run_dir} was deleted or moved during the run"
            with contextlib.suppress(OSError, ValueError):
                self._run_dir.mkdir(parents=True)
                make_again()
        except OSError:  # the directory may still exist
            pass

    def failed(self, step: int) -> RunFailed:
        """The exception that ends the run on every rank, after a checkpoint of `step` was written (none for step 0)."""
        kept = f"with a checkpoint of step {step}" if step else "before its first step"
        return RunFailed(
            f"{self.message or 'rank 0 cannot write the files of the run'}. The run ends {kept}; once the storage "
            f"works again, the same command with run.dir={self._run_dir} continues it"
        )

    @contextlib.contextmanager
    def as_run_failure(self) -> Iterator[None]:
        """Context manager around saving a checkpoint, which fails on all ranks alike.

        Raises:
            RunFailed: it could not be written.
        """
        try:
            yield
        except ValueError as error:
            raise RunFailed(f"{self.message}; {error}" if self.message else str(error)) from None
