"""Locks between processes, also on several nodes, that know who holds them. flock alone does not: a process that is
frozen (SIGSTOP, a debugger, a node that hangs) keeps its locks, and the others would wait without limit or word.

The holder describes itself in a file beside the lock and writes it anew all the while; who waits sees whether it still
does. Imports nothing heavy."""

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_BEAT = 1.0
"""Seconds between two signs of life."""
_POLL = 0.1
_MENTION = 5.0
"""Seconds of waiting that deserve a word."""


class LockTimeout(TimeoutError):
    """The process that holds a lock gives no sign of life; the message names it and the file."""


@contextlib.contextmanager
def hold_lock(
    lock: int, path: Path, *, timeout: float, waiting: Callable[[str], None] = lambda what: None
) -> Iterator[None]:
    """While entered, this process holds the lock.

    Args:
        lock: descriptor of the opened lock file; closing it is left to the caller.
        path: of the lock file.
        timeout: seconds without a sign of life of the process that holds the lock. A process that works may take long.
        waiting: called again and again with what is waited for, once that takes more than a moment; what it raises
            ends the waiting.

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
    seen = None
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
                f"{who} holds {path} and has given no sign of life for {now - since:.0f} s: "
                "let it go on (kill -CONT) or end it, and start again"
            )
        if now - started > _MENTION:
            waiting(f"waiting for {who}, which holds {path}")
        time.sleep(_POLL)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}-holder")


def _read(path: Path) -> tuple[int, str, str] | None:
    """(process, node, what changes with each sign of life)."""
    try:
        pid, node, beat = json.loads(_beside(path).read_text())
    except (OSError, ValueError, TypeError):  # it has only just begun
        return None
    return pid, node, beat


def _beat(path: Path, over: threading.Event) -> None:
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    while True:
        with contextlib.suppress(OSError):  # a full disk: who waits gives up after its time limit
            aside.write_text(json.dumps([os.getpid(), os.uname().nodename, uuid.uuid4().hex]))
            aside.replace(_beside(path))
        if over.wait(_BEAT):
            break
    for file in (aside, _beside(path)):
        with contextlib.suppress(OSError):
            file.unlink()
