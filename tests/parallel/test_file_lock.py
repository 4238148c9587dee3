"""A lock held by a process that works, that is frozen, and that died."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corpus.cache import Cache
from parallel import file_lock
from parallel.file_lock import LockTimeout, hold_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from parallel import file_lock
file_lock._BEAT = 0.05
path = Path(sys.argv[1])
with file_lock.hold_lock(os.open(path, os.O_RDWR | os.O_CREAT), path, timeout=60):
    while not Path(f"{path}-holder").exists():
        time.sleep(0.01)
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def locked(path: Path, **settings) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with hold_lock(descriptor, path, **settings):
            yield
    finally:
        os.close(descriptor)


def test_a_frozen_holder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with holder(path) as process:
        process.send_signal(signal.SIGSTOP)
        told = rf"process {process.pid} on {os.uname().nodename} holds {path} and has sent no heartbeat for 1 s"
        with pytest.raises(LockTimeout, match=told), locked(path, timeout=1):
            pass
        process.kill()
        with locked(path, timeout=30):  # a dead one holds nothing
            pass


def test_a_holder_that_works_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "_MENTION", 0.2)
    path, told, since = tmp_path / "x.lock", [], time.monotonic()
    with holder(path) as process:

        def waiting(what: str) -> None:
            told.append(what)
            if time.monotonic() > since + 4:  # longer than the time limit
                process.communicate("\n")

        with locked(path, timeout=3, waiting=waiting):
            assert len(told) > 2
    assert set(told) == {f"waiting for process {process.pid} on {os.uname().nodename}, which holds {path}"}
    assert list(tmp_path.iterdir()) == [path]


def test_an_entry_of_the_cache_that_a_frozen_process_builds(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), timeout=1)
    entry = cache.entry("things", "key", lambda folder: None)
    entry.rename(tmp_path / "elsewhere")
    with holder(entry.with_suffix(".lock")) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(LockTimeout, match=f"process {process.pid} .*{entry.name}.lock"):
            cache.entry("things", "key", lambda folder: None)


def test_kernels_that_a_frozen_process_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled here too: the lock only saves work."""
    from ops.cpp import build
    from parallel import cache_dir

    monkeypatch.setattr(cache_dir, "ROOT", str(tmp_path))
    monkeypatch.setattr(build, "_PATIENCE", 1.0)
    monkeypatch.setenv("CXX", "true")  # a program that exists

    def make(folder: Path, key: str, openmp: list[str]) -> Path:
        raise OSError(f"made {key}")

    monkeypatch.setattr(build, "_make", make)
    with pytest.raises(OSError, match="made") as failure:
        build.library()
    path = tmp_path / "kernels" / f"native-{str(failure.value).split()[1]}.lock"
    with holder(path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(OSError, match="made"):
            build.library()
