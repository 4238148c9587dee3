"""Writes this rank's file of a checkpoint in a background thread."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.checkpoint_format import write_tensors
from parallel.checkpoint_plan import file_of


class CheckpointWriter:
    """Writes the tensors that this rank contributes to one checkpoint.

    Args:
        tensors: name -> CPU tensor, which must not change while it is written.
        aside: an empty directory, the same on all ranks.
    """

    def __init__(self, tensors: dict[str, Tensor], aside: Path, rank: int):
        self.aside = aside
        self.error: Exception | None = None
        self.hashed: dict[str, list[Any]] = {}
        """File name -> [bytes, digest] of the file that this rank wrote."""
        self._written = 0
        self._tensors, self._name = tensors, file_of(rank)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)

    def start(self) -> None:
        """Starts writing in the background."""
        self._thread.start()

    def is_done(self) -> bool:
        """Whether writing this rank's file has ended, successfully or not."""
        return not self._thread.is_alive()

    def wait(self) -> Iterator[int]:
        """Waits for this rank's file. Yields the number of bytes written since the last time."""
        seen = 0
        while self._thread.is_alive():
            self._thread.join(0.05)
            seen, new = self._written, self._written - seen
            yield new

    def finish_file(self) -> None:
        """Waits for this rank's file.

        Raises:
            OSError: it could not be written.
        """
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        if not self._tensors:  # nothing to write on this rank
            return
        try:
            self.hashed[self._name] = write_tensors(self.aside / self._name, self._tensors, self._advance)
        except Exception as error:
            self.error = error

    def _advance(self, count: int) -> None:
        self._written += count
