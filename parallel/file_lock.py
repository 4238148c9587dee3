"""File locks between processes, also across nodes, that detect a holder that is frozen.

With flock alone, a frozen process (SIGSTOP, a debugger, a hanging node) keeps its locks and others wait forever. Here
the holder rewrites a heartbeat file beside the lock every second, and waiting processes read it.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

_BEAT = 1.0
"""Seconds between two heartbeats."""
_POLL, _LONGEST_POLL = 0.1, 1.0
"""Seconds between the first attempts to take a lock, and between later ones: a shared file system serves many nodes."""
_MENTION = 5.0
"""Seconds of waiting before `waiting` is called."""


class LockTimeout(TimeoutError):
    """The process that holds a lock has sent no heartbeat; the message names it and the file."""


@contextlib.contextmanager
def hold_lock(
    lock: int, path: Path, *, timeout: float, waiting: Callable[[str], None] = lambda what: None
) -> Generator[None]:
    """Context manager that holds the lock.

    Args:
        lock: descriptor of the opened lock file; the caller closes it.
        path: path of the lock file.
        timeout: seconds without a heartbeat of the process that holds the lock; the wait itself is not limited.
        waiting: called repeatedly with a message after some seconds of waiting; an exception that it raises ends the
            wait.

    Raises:
        LockTimeout: `timeout` has passed.
        OSError: the file system has no locks.
    """
    _wait(lock, path, timeout, waiting)
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, over), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()


def _wait(lock: int, path: Path, timeout: float, waiting: Callable[[str], None]) -> None:
    started = since = time.monotonic()
    seen, pause = None, _POLL
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        beat, now = _read(path), time.monotonic()
        if beat != seen:
            seen, since = beat, now
        who = f"process {beat[0]} on {beat[1]}" if beat else "a process"
        if now - since > timeout:
            raise LockTimeout(
                f"{who} holds {path} and has sent no heartbeat for {now - since:.0f} s: "
                "continue it (kill -CONT) or end it, and start again"
            )
        if now - started > _MENTION:
            waiting(f"waiting for {who}, which holds {path}")
        time.sleep(pause)
        pause = min(1.2 * pause, _LONGEST_POLL)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}-holder")


def _read(path: Path) -> tuple[int, str, str] | None:
    """(process id, node, value that changes with each heartbeat)."""
    try:
        pid, node, beat = json.loads(_beside(path).read_text())
    except (OSError, ValueError, TypeError):  # no heartbeat yet
        return None
    return pid, node, beat


def _beat(path: Path, over: threading.Event) -> None:
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    while True:
        with contextlib.suppress(OSError):  # a full disk: waiting processes time out
            aside.write_text(json.dumps([os.getpid(), os.uname().nodename, uuid.uuid4().hex]))
            aside.replace(_beside(path))
        if over.wait(_BEAT):
            break
    for file in (aside, _beside(path)):
        with contextlib.suppress(OSError):
            file.unlink()
