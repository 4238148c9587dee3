"""N ranks on one machine: processes that really exchange data, forked from a server that has imported the engine once,
or, where there may be a GPU, started anew. Used by `NPROC=N bash launch/train.sh` and by the tests, which keep one pool
of ranks for the whole session. And one rank of a world of thousands, alone, for planning."""

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
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from parallel.device_env import may_have_gpu
from parallel.env import World
from parallel.layout import Layout

if TYPE_CHECKING:  # importing it takes seconds, and a pool is started before it is needed
    from parallel.process_groups import Runtime

_GRACE = 10.0
"""Seconds between asking a rank to stop and killing it."""


class RankFailed(RuntimeError):
    """The first failure among the ranks: its message is that rank's traceback."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _end_with_parent() -> None:
    """No rank outlives the process that asked for it, not even one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


_THREADS = 32
"""Threads that finished tasks may leave in a rank. Gloo has some for every process group, which wake 100 times a
second until the group is freed; an engine holds its groups in reference cycles, which the garbage collector may not
look for in minutes, and looking for them takes a quarter of a second."""


def _threads() -> int:
    """Threads of this process, those of libraries included."""
    return len(os.listdir("/proc/self/task"))


_parent: Connection | None = None
"""Of a simulated rank, to the process that asked for it."""


def send_to_parent(kind: str, value: Any) -> bool:
    """From a simulated rank: "watched" once its end will be explained by parallel.watchdog, "verdict" with that
    explanation. Elsewhere nothing happens; returns whether it was told."""
    if _parent is not None:
        _parent.send((kind, value))
    return _parent is not None


def _serve(connection: Connection) -> None:
    """A rank's life: take (function, world, arguments), answer ("ok", result) or ("error", traceback), until None."""
    global _parent
    _parent = connection
    os.setpgrp()  # a Ctrl-C at the terminal goes to the parent alone, which decides what the ranks are told
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
    """Up to `size` rank processes, started when first needed and used again. A context manager: leaving it ends them.

    Where there may be a GPU, every rank is a new interpreter, which imports the engine for itself: some import may
    have initialised the GPU's driver, and no process that is forked after that can use it.

    Args:
        preload: modules that the fork server, where there is one, imports before the first fork.
        held_signals: blocked in the ranks from their birth on, so that one which comes early is not lost and kills
            nobody; the function that runs there unblocks them.
    """

    def __init__(
        self, size: int, preload: Sequence[str] = ("parallel.forkserver_preload",), held_signals: Collection[int] = ()
    ) -> None:
        self.size = size
        self._held_signals, self._sent = held_signals, set[int]()
        self._forks = not may_have_gpu()
        self._context = multiprocessing.get_context("forkserver" if self._forks else "spawn")
        if self._forks:
            self._context.set_forkserver_preload(list(preload))
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _grow(self, n: int) -> None:
        # The mask is inherited by the fork server and from it by the ranks, or by the ranks at once. The resource
        # tracker goes first, since starting it unblocks signals.
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
            # Not daemons: a checkpoint writer is a child of its rank.
            process = self._context.Process(target=_serve, args=(there,), daemon=False)
            process.start()
            there.close()
            self._ranks.append((process, here))
            for number in list(self._sent):
                os.kill(process.pid, number)

    def run(self, n: int, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Calls function(world, *args) on n ranks and returns their results in rank order.

        Args:
            function: importable by name; its world has the rank, the size and a fresh rendezvous port.
            timeout: seconds; None waits forever.

        Raises:
            RankFailed: a rank raised or died, or the time was up. All ranks are ended; the next run starts new ones.
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
            ready = wait(list(waiting), left)
            if not ready:
                raise RankFailed(death or f"ranks {sorted(waiting.values())} gave no answer within {timeout:g} s")
            for connection in ready:
                rank = waiting[connection]
                try:
                    verdict, value = connection.recv()
                except EOFError:
                    del waiting[connection]
                    process = ranks[rank][0]
                    process.join(_GRACE)
                    death = death or f"rank {rank} died (exit code {process.exitcode})"
                    if not watched or not waiting:
                        raise RankFailed(death) from None
                    # The others will tell what it left them waiting in.
                    deadline = min(deadline or math.inf, time.monotonic() + _GRACE)
                    continue
                if verdict == "watched":
                    watched = True
                    continue
                del waiting[connection]
                if verdict == "error":
                    raise RankFailed(f"{death + chr(10) if death else ''}rank {rank} failed:\n{value}")
                if verdict == "verdict":
                    raise RankFailed(f"{death + '; ' if death else ''}{value}")
                results[rank] = value
        if death:
            raise RankFailed(death)
        return [results[rank] for rank in range(len(ranks))]

    def signal(self, number: int) -> None:
        """Sends a signal to every rank, also to those that are still to be started. May be called by a signal handler,
        at any moment."""
        self._sent.add(number)
        for process, _ in self._ranks:
            if not wait([process.sentinel], 0):
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Ends every rank and what it started, and waits for nothing. May be called by another thread."""
        for process, _ in self._ranks:
            for end, target in ((os.killpg, process.pid), (os.kill, process.pid)):
                with contextlib.suppress(OSError):  # gone, or too young to have a group
                    end(target, signal.SIGKILL)

    def close(self, *, at_once: bool = False) -> None:
        """Ends every rank and whatever it started."""
        for process, connection in self._ranks:
            if process.is_alive() and not at_once:
                try:
                    connection.send(None)
                    process.join(_GRACE)
                except OSError:  # it died meanwhile
                    pass
            # Also when the rank itself is gone: what it started is still in its process group.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # nobody is left, or it was too young to have a group
                process.kill()
            process.join()
            connection.close()
        self._ranks.clear()
        self._sent.clear()


def run_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    """Calls function(world, *args) on n ranks of their own and returns their results in rank order. When it returns or
    raises, none of their processes is left.

    Args:
        timeout: seconds.

    Raises:
        RankFailed: as RankPool.run.
    """
    with RankPool(n) as pool:
        return pool.run(n, function, *args, timeout=timeout)


@contextlib.contextmanager
def fake_rank(layout: Layout, rank: int) -> "Iterator[Runtime]":
    """One rank of a world of any size, without peers: its groups know their sizes and exchange nothing, and what is
    built while this is entered has shapes but no memory. For counting what a rank of a layout would hold."""
    import torch
    import torch.distributed as dist

    from parallel.megatron_compat import layers_made_on
    from parallel.process_groups import Groups, Runtime
    from parallel.torch_private import fake_store

    def group(*axes: str) -> dist.ProcessGroup:
        # Megatron-Core's own function would make every group of the world, not this rank's alone.
        return dist.new_group(layout.group(rank, *axes), use_local_synchronization=True)

    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=layout.world)
    try:
        groups = Groups(
            **{name: group(name) for name in ("tp", "cp", "pp", "dp", "ep", "etp", "edp")},
            dp_cp=group("dp", "cp"),
            tp_cp=group("tp", "cp"),
            embedding=None,
            world=dist.group.WORLD,
        )
        meta = torch.device("meta")
        with meta, layers_made_on(meta):
            yield Runtime(World(rank, layout.world), layout, groups, meta, "fake")
    finally:
        dist.destroy_process_group()
