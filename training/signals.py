"""Signals that ask a run to stop. Imports nothing heavy: the handlers are installed before anything else is imported,
so that none of them is lost."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GO_ON, STOP, FAIL, LEAVE = 0, 1, 2, 3
"""What the ranks agree on after a step: the next one; an end with a checkpoint; a failure, with a checkpoint if there
is room for one; an end without writing anything."""
INTERRUPTED, STOPPED = 130, 75
"""Exit codes: Ctrl-C before the first step, or a second one at any time; another signal, please requeue."""
_PROMPT = 5.0
"""Seconds within which data preparation has ended, whatever it is at."""


class EndedEarly(KeyboardInterrupt):
    """Raised by `StopRequest.check`: a signal asked for an end while there was nothing to save."""


class StopRequest:
    """While entered, a signal that asks for an end is remembered instead of obeyed, so that the step in progress can
    be finished and a checkpoint written. Enter it in the main thread.

    A second Ctrl-C, or one that follows another signal, ends the process at once with one line and exit code 130, also
    while the main thread is held up in a collective or by the disk: checkpoints are complete or not there at all.

    Args:
        signals: those to remember. SIGHUP stays ignored where it is: under nohup.
        received: the name of one that came earlier.
        urgent: whether this process ends itself at a second Ctrl-C; not a simulated rank, which its parent ends.
        speaks: whether it says so; not the ranks after the first.
    """

    def __init__(
        self,
        signals: Iterable[int] = STOP_SIGNALS,
        received: str | None = None,
        *,
        urgent: bool = True,
        is_main_process: bool = True,
    ) -> None:
        self.received = received
        self._signals = tuple(signals)
        self._urgent, self._is_main_process = urgent, is_main_process
        self._previous: dict[int, Any] = {}
        self._forward: Callable[[int], None] | None = None
        self._last_acts: list[Callable[[], None]] = []
        self._preparing = False
        self._ending = threading.Lock()

    def __enter__(self) -> Self:
        if self._urgent:
            # The C part of a signal handler writes here, whatever the main thread is at.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        # A rank is born with them blocked (parallel.local_launcher): those that came meanwhile are delivered here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._urgent:
            signal.set_wakeup_fd(self._previous_fd)
            os.write(self._write, b"\0")
            self._thread.join()
            os.close(self._read)
            os.close(self._write)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if self._forward:
            forward, self._forward = self._forward, None
            forward(number)

    @property
    def reason(self) -> str:
        return self.received or "a signal to another rank"

    @contextlib.contextmanager
    def preparing(self, last_act: Callable[[], None]) -> Iterator[None]:
        """While entered, there is nothing to save: `check` raises, and what does not call it is ended within seconds
        all the same, after `last_act`."""
        self._last_acts.append(last_act)
        self._preparing = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self._preparing = False
            self._last_acts.remove(last_act)

    def check(self) -> None:
        """Between two pieces of work.

        Raises:
            EndedEarly: a signal has asked for an end.
        """
        if self._preparing and self.received is not None:
            raise EndedEarly(self.received)

    @contextlib.contextmanager
    def forwarded(self, send: Callable[[int], None], end: Callable[[], None]) -> Iterator[None]:
        """While entered, the first signal, also one that came before, is passed on with `send`; `end` is called before
        this process ends at once."""
        self._last_acts.append(end)
        try:
            self._forward = send
            if self.received is not None:
                self._remember(signal.Signals[self.received], None)
            yield
        finally:
            self._forward = None
            self._last_acts.remove(end)

    def end_early(self, code: int | None = None) -> NoReturn:
        """Ends this process, and with it every thread of data preparation, before the first step. `code`: None:
        INTERRUPTED or STOPPED."""
        usual = INTERRUPTED if self.received == signal.SIGINT.name else STOPPED
        self._end(usual if code is None else code, f"stopped by {self.received} before the first step")

    def _end(self, code: int, why: str) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(_PROMPT)  # the other thread is at it
        for act in self._last_acts:
            with contextlib.suppress(Exception):
                act()
        if self._is_main_process:
            line = f"switchyard: {why}\n"
            with contextlib.suppress(OSError):
                # On a terminal a progress line may be in the way. Not through sys.stderr, which others may hold.
                os.write(2, f"\r\x1b[K{line}".encode() if os.isatty(2) else line.encode())
        os._exit(code)

    def _listen(self) -> None:
        """A thread's work: what cannot wait for the main thread."""
        asked, limit = self.received is not None, None
        while True:
            ready = select.select([self._read], [], [], None if limit is None else max(0.0, limit - time.monotonic()))
            for number in os.read(self._read, 64) if ready[0] else b"":
                if number == 0:  # from __exit__
                    return
                if number not in self._signals:
                    continue
                if asked and number == signal.SIGINT:
                    self._end(INTERRUPTED, "interrupted again: ended at once, without a checkpoint of these last steps")
                # The main thread may be in a library for long, before Python's part of the handler has its turn.
                asked, self.received = True, self.received or signal.Signals(number).name
                limit = time.monotonic() + _PROMPT
            if limit is not None and time.monotonic() >= limit:
                limit = None
                if self._preparing and self.received is not None:
                    self.end_early()

    def agreed(self, device: "torch.device", *, fail: bool = False, leave: bool = False) -> int:
        """GO_ON, STOP when any rank was asked to stop, FAIL when one cannot go on, LEAVE when one has to. Every rank
        calls this after every step, so all stop after the same."""
        import torch
        import torch.distributed as dist

        mine = LEAVE if leave else FAIL if fail else STOP if self.received is not None else GO_ON
        if dist.get_world_size() == 1:
            return mine
        all_of_us = torch.tensor([mine], dtype=torch.int32, device=device)
        dist.all_reduce(all_of_us, op=dist.ReduceOp.MAX)
        return int(all_of_us.item())
