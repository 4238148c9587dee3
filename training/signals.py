"""Handles signals that request the end of a run. Does not import torch: the handlers are installed before anything else
is imported, so that no signal is lost."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GO_ON, STOP, FAIL, LEAVE = 0, 1, 2, 3
"""What the ranks agree on after a step: continue; stop with a checkpoint; fail, with a checkpoint if it can be written;
leave without writing anything."""
INTERRUPTED, STOPPED = 130, 75
"""Exit codes: Ctrl-C before the first step, or a second one at any time; another signal, to be requeued."""
_PROMPT = 5.0
"""Seconds after a signal within which data preparation is ended."""


class EndedEarly(KeyboardInterrupt):
    """Raised by `StopRequest.check` if a signal was received while there was nothing to save."""


class StopRequest:
    """Context manager that records signals instead of ending the process, so that the current step can be finished and
    a checkpoint be written. Enter it in the main thread.

    A second Ctrl-C, or a Ctrl-C after another signal, ends the process immediately with a message and exit code 130,
    even if the main thread is blocked in a collective or by the disk. Checkpoints are written atomically.

    Args:
        signals: the signals to record. SIGHUP stays ignored if it is (nohup).
        received: name of a signal that was received earlier.
        urgent: whether this process ends itself at a second Ctrl-C; False for simulated ranks, which their parent ends.
        is_main_process: whether this process prints the message.
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
            # Python's C signal handler writes to this descriptor, whatever the main thread is doing.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        # Ranks start with these signals blocked (parallel.local_launcher): pending ones are delivered here.
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
        """While entered, there is nothing to save: after a signal `check` raises, and the process is ended within
        seconds even if nothing calls it. `last_act` is called before that."""
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
        """Called regularly during data preparation.

        Raises:
            EndedEarly: a signal was received.
        """
        if self._preparing and self.received is not None:
            raise EndedEarly(self.received)

    @contextlib.contextmanager
    def forwarded(self, send: Callable[[int], None], end: Callable[[], None]) -> Iterator[None]:
        """While entered, the first signal, including one received before, is forwarded with `send`; `end` is called
        before this process ends immediately."""
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
        """Ends this process and all threads of data preparation before the first step. `code`: None: INTERRUPTED or
        STOPPED, depending on the signal."""
        usual = INTERRUPTED if self.received == signal.SIGINT.name else STOPPED
        self._end(usual if code is None else code, f"stopped by {self.received} before the first step")

    def _end(self, code: int, why: str) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(_PROMPT)  # another thread is ending the process
        for act in self._last_acts:
            with contextlib.suppress(Exception):
                act()
        if self._is_main_process:
            line = f"switchyard: {why}\n"
            with contextlib.suppress(OSError):
                # Clears a progress line on a terminal. Not through sys.stderr, whose lock another thread may hold.
                os.write(2, f"\r\x1b[K{line}".encode() if os.isatty(2) else line.encode())
        os._exit(code)

    def _listen(self) -> None:
        """Main loop of the thread that handles what cannot wait for the main thread."""
        asked, limit = self.received is not None, None
        while True:
            ready = select.select([self._read], [], [], None if limit is None else max(0.0, limit - time.monotonic()))
            for number in os.read(self._read, 64) if ready[0] else b"":
                if number == 0:  # from __exit__
                    return
                if number not in self._signals:
                    continue
                if asked and number == signal.SIGINT:
                    self._end(INTERRUPTED, "interrupted again: ended immediately, without a checkpoint of these steps")
                # The main thread may be blocked in a library and not run the Python handler for a long time.
                asked, self.received = True, self.received or signal.Signals(number).name
                limit = time.monotonic() + _PROMPT
            if limit is not None and time.monotonic() >= limit:
                limit = None
                if self._preparing and self.received is not None:
                    self.end_early()

    def state(self, *, fail: bool = False, leave: bool = False) -> int:
        """This rank's state: GO_ON, STOP if it has received a signal, FAIL if it cannot continue, LEAVE if it must not
        write any more. The ranks agree on the most severe one (training.agreement)."""
        return LEAVE if leave else FAIL if fail else STOP if self.received is not None else GO_ON
