"""One rank of each node asks the ranks' store whether a failure was announced; the others of the node read its answer
from a file on the node. The store, which rank 0 hosts, serves the nodes and not all ranks."""

import contextlib
import os
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from parallel.env import World
from parallel.rendezvous import StoreTimeout

PATIENCE = 5
"""Periods without a sign of the rank that asks, after which the others ask the store themselves: it has died, is frozen
or leaves."""
_RECORD = struct.Struct("<qq?")
"""Counts of its questions and of the store's answers, and whether a failure was announced."""


class NodeWatch:
    """Whether any rank has announced a failure.

    Args:
        period: seconds between two questions of a node to the store.
        ask: calls its argument with the store and returns the result. Raises StoreTimeout.
    """

    def __init__(self, world: World, period: float, ask: Callable[[Callable[[dist.Store], Any]], Any]) -> None:
        self._ask, self._patience = ask, PATIENCE * period
        self._key = f"watcher on {node_name()}"
        self._asks = world.local_rank == 0
        self.pause = period if self._asks else period / 4
        """Seconds between two calls of `look`."""
        self._questions = self._answers = 0
        self._seen = time.monotonic()
        self._path: str | None = None
        if self._asks and world.local_size > 1:
            self._open()

    def _open(self) -> None:
        """Creates the file and tells the other ranks of this node where it is. Without it they ask the store."""
        with contextlib.suppress(OSError):
            file, self._path = tempfile.mkstemp(prefix="switchyard-watch-")
            os.close(file)
            self._write(False)
            with contextlib.suppress(StoreTimeout):
                self._ask(lambda store: store.set(self._key, str(self._path)))

    def look(self) -> tuple[bool, bool]:
        """(whether a failure was announced, or the store has ended; whether the store has answered since the last
        call). `pause` seconds are to pass between two calls."""
        record = None if self._asks else self._read()
        if record is None:
            failed, answered = self._ask_store()
            if self._asks and self._path:
                self._write(failed)
            return failed, answered
        questions, answers, failed = record
        now = time.monotonic()
        if questions != self._questions:
            self._questions, self._seen = questions, now
        elif now - self._seen > self._patience:
            self._seen = now - self._patience * (1 - 1 / PATIENCE)  # as often as that rank would
            return self._ask_store()
        answered, self._answers = answers != self._answers, answers
        return failed, answered

    def _ask_store(self) -> tuple[bool, bool]:
        if self._asks:
            self._questions += 1
        try:
            failed = self._ask(lambda store: store.check(["failure"]))
        except StoreTimeout:  # it may be busy; whether this is a failure is for the caller to decide
            return False, False
        except Exception:  # the store has ended
            return True, False
        if self._asks:
            self._answers += 1
        return failed, True

    def _write(self, failed: bool) -> None:
        assert self._path is not None
        with contextlib.suppress(OSError), open(self._path, "r+b", buffering=0) as file:
            file.write(_RECORD.pack(self._questions, self._answers, failed))

    def _read(self) -> tuple[int, int, bool] | None:
        """What the rank that asks has written; None: there is nothing to read, or not yet."""
        try:
            if self._path is None and self._ask(lambda store: store.check([self._key])):
                self._path = self._ask(lambda store: store.get(self._key)).decode()
            if self._path is None:
                return None
            with open(self._path, "rb") as file:
                return _RECORD.unpack(file.read())
        except Exception:  # another /tmp, a file that was removed, or a store that does not answer
            return None

    def close(self) -> None:
        """Removes the file."""
        if self._asks and self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def node_name() -> str:
    return os.uname().nodename
