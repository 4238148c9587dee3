"""Threads that read the batches of the next steps, and index the next epoch, so that no step waits for either."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Batch = TypeVar("Batch")
_LEAVE_SECONDS = 5.0


class ReadAhead(Generic[Batch]):
    """The batches of consecutive steps, in order.

    Only batches that `next` has returned count as used: a run that stops and continues starts with the first one that
    it has not used, whatever was read beyond it. An exception of the thread is raised by `next` in place of the batch
    that it belongs to, after the batches before it.
    """

    def __init__(self, load: Callable[[int], Batch], steps: range, *, depth: int) -> None:
        """
        Args:
            load: the batch that begins with a sample. Called by one thread at a time, in order.
            steps: the first sample of each step.
            depth: batches that are held ready. 0: none, they are loaded by `next`.
        """
        self._load, self._steps, self._depth = load, iter(steps), depth
        self._ready: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        if depth:
            self._thread.start()

    def next(self) -> Batch:
        """The batch of the next step; waits for it."""
        if not self._depth:
            return self._load(next(self._steps))
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        assert self._error is not None
        raise self._error

    def close(self) -> None:
        """Ends the thread. One that storage does not answer is left behind: it ends with the process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._depth:
            self._thread.join(_LEAVE_SECONDS)

    def _run(self) -> None:
        try:
            for first in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                batch = self._load(first)
                with self._changed:
                    self._ready.append(batch)
                    self._changed.notify_all()
            raise AssertionError("a batch is asked for after the last step")
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


class IndexAhead:
    """Builds the index of the next epoch in a thread once half of an epoch has passed."""

    def __init__(self, build: Callable[[int], object]) -> None:
        """
        Args:
            build: builds and saves the index of an epoch, if there is none.
        """
        self._build, self._newest = build, 0

    def passed(self, epoch: int, at: int, size: int) -> None:
        """Sample `at` of the `size` samples of an epoch is read."""
        if 2 * at >= size and self._newest <= epoch:
            self._newest = epoch + 1
            threading.Thread(target=self._run, args=(epoch + 1,), name="index", daemon=True).start()

    def _run(self, epoch: int) -> None:
        with suppress(Exception):  # it is built, or fails, where the epoch begins
            self._build(epoch)
