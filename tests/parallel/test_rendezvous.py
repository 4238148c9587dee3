"""Ranks that meet, and those that wait in vain: nothing is waited for past the time limit."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool, free_port


class Joining:
    """A process that joins the others, or says why not."""

    def __init__(self, rank: int, port: int, timeout: float, secret: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["parallel.forkserver_preload"])  # as RankPool: importing torch takes seconds
        self._answers, there = context.Pipe()
        self.process = context.Process(target=join, args=(there, rank, port, timeout, secret))
        self.process.start()
        there.close()

    def answer(self) -> str:
        assert self._answers.poll(120)
        return self._answers.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def join(parent: Connection, rank: int, port: int, timeout: float, secret: str) -> None:
    """Tells the parent whether this rank met the other one, and stays until the parent ends (the process' function)."""
    from parallel import rendezvous

    try:
        store = rendezvous.join(World(rank, 2, rank, 2, "127.0.0.1", port, secret=secret), timeout)
    except rendezvous.RendezvousError as error:
        parent.send(str(error))
    else:
        store.set(f"from {rank}", "")
        parent.send("met")
    with contextlib.suppress(EOFError):
        parent.recv()


@pytest.fixture
def joining() -> Iterator[Callable[..., Joining]]:
    processes = []

    def begin(rank: int, port: int, timeout: float, secret: str = "s") -> Joining:
        processes.append(Joining(rank, port, timeout, secret))
        return processes[-1]

    yield begin
    for process in processes:
        process.end()


def test_they_meet_on_their_address_alone(joining) -> None:
    port = free_port()
    first, second = joining(0, port, 60), joining(1, port, 60)
    assert first.answer() == second.answer() == "met"
    connections = psutil.Process(first.process.pid).net_connections()
    listening = [one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_who_does_not_know_the_secret_meets_nobody(joining) -> None:
    port = free_port()
    joining(0, port, 120)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    told = joining(1, port, 2, "guessed").answer()
    assert told.startswith(f"rank 0 did not join the rendezvous at 127.0.0.1:{port} within 2 s (runtime.time")


def test_rank_1_is_missing(joining) -> None:
    assert joining(0, free_port(), 2).answer().startswith("rank 1 did not join the rendezvous at 127.0.0.1:")


def test_rank_0_is_missing(joining) -> None:
    port = free_port()
    assert joining(1, port, 2).answer().startswith(f"rank 0 did not open the rendezvous at 127.0.0.1:{port} within")


def test_a_port_that_is_taken(joining) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        first, second = joining(0, port, 3), joining(1, port, 3)
        told = first.answer()
        assert told.startswith(f"cannot listen on 127.0.0.1:{port} for the rendezvous: Address already")
        told = second.answer()
        assert "accepts connections but does not answer within 3 s" in told and "another process has the port" in told


def freeze(world: World, how: str, mark: Path) -> None:
    """One rank is frozen while the groups are built; the others end (rank function for the pool)."""
    import torch.distributed as dist

    from parallel import process_groups, rendezvous
    from parallel.layout import Layout
    from parallel.watchdog import Watchdog

    frozen = 0 if how == "rank 0" else 1
    store = rendezvous.join(world, 60)
    with Watchdog(world, 5.0, store=store):
        build = process_groups.build_groups

        def stop_here(*args, **named):
            if world.rank == frozen:
                mark.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return build(*args, **named)

        process_groups.build_groups = stop_here
        process_groups.start(world, Layout(world.size), seed=1, timeout=5.0, threads=1, store=store)
    dist.destroy_process_group()


@pytest.mark.parametrize(("how", "told"), [("rank 0", "rank 0 does not answer"), ("rank 1", "rank 1 does not respond")])
def test_a_rank_that_is_frozen_while_groups_are_built(how: str, told: str, tmp_path: Path) -> None:

    mark = tmp_path / "mark"
    with RankPool(2) as pool, pytest.raises(RankFailed, match=told):
        pool.run(2, freeze, how, mark, timeout=90)
    assert time.time() - mark.stat().st_mtime < 30  # 5 s where the machine is idle


def test_a_rank_that_has_met_the_others_keeps_no_thread() -> None:
    from parallel import rendezvous

    def asking() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "store"]

    before = asking()
    store = rendezvous.join(World(0, 1, 0, 1, "127.0.0.1", free_port()), 30)
    for thread in asking():
        if thread not in before:
            thread.join(30)
    assert asking() == before
    store.set("key", "value")
    assert store.get("key") == b"value"
