"""Launches ranks as processes on this machine, for `NPROC=N bash launch/train.sh` and for tests.

Ranks are forked from a server that has imported Megatron-Core, or spawned where there may be a GPU. `fake_rank` builds
one rank of a world of any size without its peers.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TypeVar, cast

from parallel.device_env import may_have_gpu
from parallel.env import World
from parallel.layout import Layout

if TYPE_CHECKING:  # importing it takes seconds
    from parallel.process_groups import Runtime

T = TypeVar("T")
_GRACE = 10.0
"""Seconds between asking a rank to exit and killing it."""


class RankFailed(RuntimeError):
    """A rank failed; the message is the traceback of the first one."""


def free_port() -> int:
    """A port of this machine that nothing listens on, below those that systems give to connections by themselves: of
    these another process could get it before it is listened on."""
    while True:
        port = secrets.choice(range(10_000, 32_768))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _end_with_parent() -> None:
    """Kills this rank's process group when the parent process ends, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


_THREADS = 32
"""Number of threads that finished tasks may leave behind before garbage is collected. Every gloo process group has
threads that wake up 100 times a second until the group is freed. An engine holds its groups in reference cycles, which
the garbage collector may not visit for minutes; a collection takes a quarter of a second."""


def _threads() -> int:
    """Number of threads of this process, including those of libraries."""
    return len(os.listdir("/proc/self/task"))


_parent: Connection | None = None
"""The connection of a simulated rank to its parent process."""


def send_to_parent(kind: str, value: object) -> bool:
    """Sends a message from a simulated rank to its parent: "watched" once parallel.watchdog will explain failures,
    "diagnosis" with that explanation. Returns False, and does nothing, in other processes."""
    if _parent is not None:
        _parent.send((kind, value))
    return _parent is not None


def _serve(connection: Connection) -> None:
    """The main loop of a rank: receives (function, world, arguments) and sends ("ok", result) or ("error", traceback),
    until it receives None."""
    global _parent
    _parent = connection
    os.setpgrp()  # a Ctrl-C at the terminal goes to the parent only, which signals the ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    kept = _threads()
    while (task := connection.recv()) is not None:
        function, world, args = task
        try:
            answer = ("ok", function(world, *args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send(answer)
        if _threads() > kept + _THREADS:
            gc.collect()
            kept = _threads()


class RankPool:
    """Context manager for up to `size` rank processes, which are started when first needed and reused.

    Where there may be a GPU, every rank is spawned as a new interpreter: an import may have initialized the GPU's
    driver, which then cannot be used in forked processes.

    Args:
        preload: modules that the fork server imports before the first fork.
        held_signals: signals that are blocked in new ranks, so that an early one is neither lost nor fatal; the
            function that runs there unblocks them.
    """

    def __init__(
        self, size: int, preload: Sequence[str] = ("parallel.forkserver_preload",), held_signals: Collection[int] = ()
    ) -> None:
        self.size = size
        self._held_signals, self._sent = held_signals, set[int]()
        self._forks = not may_have_gpu()
        self._context = (
            multiprocessing.get_context("forkserver") if self._forks else multiprocessing.get_context("spawn")
        )
        if self._forks:
            self._context.set_forkserver_preload(list(preload))
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _grow(self, n: int) -> None:
        # The ranks inherit the mask, directly or through the fork server. The resource tracker is started first, since
        # starting it unblocks signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._held_signals)
        try:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, self._held_signals)
            if self._forks:
                forkserver.ensure_running()
            else:
                self._start_up_to(n)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._start_up_to(n)

    def _start_up_to(self, n: int) -> None:
        while len(self._ranks) < n:
            here, there = self._context.Pipe()
            # Not daemonic, so that ranks may have child processes.
            process = self._context.Process(target=_serve, args=(there,), daemon=False)
            process.start()
            assert process.pid is not None
            there.close()
            self._ranks.append((process, here))
            for number in list(self._sent):
                os.kill(process.pid, number)

    def run(self, n: int, function: Callable[..., T], *args: object, timeout: float | None = None) -> list[T]:
        """Calls function(world, *args) on n ranks and returns their results in rank order.

        Args:
            function: importable by name. Its `world` has the rank, the world size and an unused rendezvous port.
            timeout: seconds; None: no limit.

        Raises:
            RankFailed: a rank raised or died, or the timeout expired. All ranks are ended; the next run starts new
            ones.
        """
        assert n <= self.size, (n, self.size)
        self._grow(n)
        port, secret = free_port(), secrets.token_hex(16)
        ranks = self._ranks[:n]
        for rank, (_, connection) in enumerate(ranks):
            connection.send((function, World(rank, n, rank, n, "127.0.0.1", port, True, secret), args))
        try:
            return self._collect(ranks, timeout)
        except BaseException:
            self.close(at_once=True)
            raise

    def _collect(self, ranks: list[tuple[Any, Connection]], timeout: float | None) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
        watched, death = False, ""
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = cast("list[Connection]", wait(list(waiting), left))
            if not ready:
                raise RankFailed(death or f"ranks {sorted(waiting.values())} did not finish within {timeout:g} s")
            for connection in ready:
                rank = waiting[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    del waiting[connection]
                    process = ranks[rank][0]
                    process.join(_GRACE)
                    death = death or f"rank {rank} died (exit code {process.exitcode})"
                    if not watched or not waiting:
                        raise RankFailed(death) from None
                    # The others report what they were waiting for.
                    deadline = min(deadline or math.inf, time.monotonic() + _GRACE)
                    continue
                if kind == "watched":
                    watched = True
                    continue
                del waiting[connection]
                if kind == "error":
                    raise RankFailed(f"{death + chr(10) if death else ''}rank {rank} failed:\n{value}")
                if kind == "diagnosis":
                    raise RankFailed(f"{death + '; ' if death else ''}{value}")
                results[rank] = value
        if death:
            raise RankFailed(death)
        return [results[rank] for rank in range(len(ranks))]

    def signal(self, number: int) -> None:
        """Sends a signal to every rank, including those that are started later. May be called from a signal handler."""
        self._sent.add(number)
        for process, _ in self._ranks:
            if not wait([process.sentinel], 0):
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Kills every rank and its child processes without waiting. May be called from another thread."""
        for process, _ in self._ranks:
            for end, target in ((os.killpg, process.pid), (os.kill, process.pid)):
                with contextlib.suppress(OSError):  # it has ended, or has no process group yet
                    end(target, signal.SIGKILL)

    def close(self, *, at_once: bool = False) -> None:
        """Ends every rank and its child processes."""
        for process, connection in self._ranks:
            if process.is_alive() and not at_once:
                try:
                    connection.send(None)
                    process.join(_GRACE)
                except OSError:  # it has died
                    pass
            # Also if the rank itself has ended: its child processes are in its process group.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # all have ended, or it has no process group yet
                process.kill()
            process.join()
            connection.close()
        self._ranks.clear()
        self._sent.clear()


def run_ranks(n: int, function: Callable[..., T], *args: object, timeout: float) -> list[T]:
    """Calls function(world, *args) on n new ranks and returns their results in rank order. All processes have ended
    when it returns or raises.

    Args:
        timeout: seconds.

    Raises:
        RankFailed: as RankPool.run.
    """
    with RankPool(n) as pool:
        return pool.run(n, function, *args, timeout=timeout)


@contextlib.contextmanager
def fake_rank(layout: Layout, rank: int) -> "Generator[Runtime]":
    """One rank of a world of any size, without peers. Its process groups have their sizes but communicate nothing, and
    modules built inside are on the meta device. For counting what a rank of a layout would hold."""
    import torch
    import torch.distributed as dist

    from parallel.megatron_compat import layers_made_on
    from parallel.process_groups import Runtime, build_groups
    from parallel.torch_private import fake_store

    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=layout.world)
    try:
        groups = build_groups(layout, rank, embedding=True)
        meta = torch.device("meta")
        with meta, layers_made_on(meta):
            yield Runtime(World(rank, layout.world), layout, groups, meta, "fake")
    finally:
        dist.destroy_process_group()
