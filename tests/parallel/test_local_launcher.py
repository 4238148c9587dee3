"""Rank processes: their answers, their failures, and that none of them stays."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from parallel import local_launcher
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool, run_ranks


@pytest.fixture
def pool():
    with RankPool(3) as pool:
        yield pool


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def who(world: World) -> tuple[World, int]:
    time.sleep(0.1 * (world.size - world.rank))  # the last rank answers first
    return world, os.getpid()


def test_answers_come_in_rank_order_from_the_same_processes(pool):
    first, second = pool.run(3, who), pool.run(2, who)
    port = first[0][0].port
    assert [world for world, _ in first] == [World(r, 3, r, 3, "127.0.0.1", port, simulated=True) for r in range(3)]
    assert [world.size for world, _ in second] == [2, 2]
    assert [pid for _, pid in second] == [pid for _, pid in first][:2]
    pool.close()
    assert all(wait_until(lambda pid=pid: gone(pid)) for _, pid in first)


def with_arguments(world: World, a: int, b: str) -> str:
    return f"{world.rank} {a} {b}"


def test_arguments(pool):
    assert pool.run(2, with_arguments, 7, "x") == ["0 7 x", "1 7 x"]


def fail_on_rank_1(world: World, how: str, marks: Path) -> None:
    """Rank 1 fails; the others wait for ever, each with a child that would."""
    child = subprocess.Popen(["sleep", "600"])
    (marks / f"{world.rank}").write_text(f"{os.getpid()} {child.pid}")
    if world.rank != 1:
        time.sleep(600)
    wait_until(lambda: len(list(marks.iterdir())) == world.size)
    if how == "raise":
        raise ValueError("boom")
    if how == "exit":
        sys.exit(3)
    if how == "die":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)


def left_alive(marks: Path) -> list[int]:
    pids = [int(pid) for mark in marks.iterdir() for pid in mark.read_text().split()]
    assert len(pids) == 6
    return [pid for pid in pids if not gone(pid)]


@pytest.mark.parametrize(
    "how, told",
    [
        ("raise", r"(?s)rank 1 failed:.*in fail_on_rank_1.*ValueError: boom"),
        ("exit", r"(?s)rank 1 failed:.*SystemExit: 3"),
        ("die", r"rank 1 died \(exit code 7\)"),
        ("kill", r"rank 1 died \(exit code -9\)"),
    ],
)
def test_one_failure_ends_all_and_is_told(pool, tmp_path, how, told):
    started = time.monotonic()
    with pytest.raises(RankFailed, match=told):
        pool.run(3, fail_on_rank_1, how, tmp_path, timeout=60)
    assert time.monotonic() - started < 10
    assert wait_until(lambda: not left_alive(tmp_path)), left_alive(tmp_path)
    assert len(pool.run(3, who)) == 3  # and the pool can be used again


def wait_for_ever(world: World, marks: Path) -> None:
    if world.rank > 0:
        child = subprocess.Popen(["sleep", "600"])
        (marks / f"{world.rank}").write_text(f"{os.getpid()} {child.pid} {child.pid}")
        time.sleep(600)


def test_time_out_names_who_is_late(pool, tmp_path):
    pool.run(3, who)  # so that the time is not spent on starting
    with pytest.raises(RankFailed, match=r"ranks \[1, 2\] did not finish within 1 s"):
        pool.run(3, wait_for_ever, tmp_path, timeout=1)
    assert wait_until(lambda: not left_alive(tmp_path))
    assert len(pool.run(3, who)) == 3


def leave_a_child(world: World) -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def test_closing_ends_what_the_ranks_started():
    with RankPool(2) as pool:
        children = pool.run(2, leave_a_child)
        assert not any(map(gone, children))
    assert wait_until(lambda: all(map(gone, children)))


def wait_for_a_signal(world: World, marks: Path) -> int:
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    (marks / f"{world.rank}").touch()
    wait_until(lambda: bool(got))
    return got[0]


def test_a_signal_reaches_every_rank(pool, tmp_path):
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.extend(pool.run(2, wait_for_a_signal, tmp_path, timeout=30)))
    thread.start()
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    pool.signal(signal.SIGUSR1)
    thread.join()
    assert answers == [signal.SIGUSR1] * 2


PARENT = """
import sys
from pathlib import Path
from parallel.local_launcher import RankPool
from tests.parallel.test_local_launcher import wait_for_ever
with RankPool(3, preload=()) as pool:
    pool.run(3, wait_for_ever, Path(sys.argv[1]))
"""


def test_a_killed_parent_takes_its_ranks_along(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    assert wait_until(lambda: len(list(tmp_path.glob("[12]"))) == 2, seconds=60)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not left_alive(tmp_path)), left_alive(tmp_path)


def leave_a_child_and_sleep(world: World, marks: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (marks / f"{world.rank}").write_text(f"{os.getpid()} {child.pid} {child.pid}")
    if world.rank == 1:
        time.sleep(600)


def test_ranks_of_their_own(tmp_path):
    assert run_ranks(2, with_arguments, 7, "x", timeout=60) == ["0 7 x", "1 7 x"]
    with pytest.raises(RankFailed, match=r"ranks \[1\] did not finish within 3 s"):
        run_ranks(2, leave_a_child_and_sleep, tmp_path, timeout=3)
    assert wait_until(lambda: not left_alive(tmp_path))


def how_started(world: World, number: int) -> tuple[str | None, bool, bool]:
    """(start method, whether torch had been imported, whether a blocked signal came)."""
    came = wait_until(lambda: number in signal.sigpending())
    return multiprocessing.get_start_method(allow_none=True), "torch" in sys.modules, came


def test_no_rank_is_forked_where_there_may_be_a_gpu(monkeypatch):
    """Nothing that the parent or a fork server imported can have initialised the driver in them; and a signal that
    comes before a rank has begun is not lost."""
    monkeypatch.setattr(local_launcher, "may_have_gpu", lambda: True)
    with RankPool(2, held_signals=(signal.SIGUSR1,)) as pool:
        pool.signal(signal.SIGUSR1)  # as early as can be: no rank exists
        assert pool.run(2, how_started, signal.SIGUSR1, timeout=60) == [("spawn", False, True)] * 2
        assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Threads:
    """Twenty threads that end when this is freed, which a reference cycle puts off: as an engine's process groups."""

    def __init__(self) -> None:
        self.itself, self.over = self, threading.Event()
        self.threads = [threading.Thread(target=self.over.wait, daemon=True) for _ in range(20)]
        for thread in self.threads:
            thread.start()

    def __del__(self) -> None:
        self.over.set()
        for thread in self.threads:  # as gloo's destructors
            thread.join()


def leave_threads(world: World) -> int:
    gc.disable()  # however seldom it would come by itself
    Threads()
    return psutil.Process().num_threads()


def test_threads_that_tasks_leave_are_bounded(pool):
    most = max(pool.run(1, leave_threads)[0] for _ in range(15))
    assert most <= 20 + local_launcher._THREADS + 2 * 20
