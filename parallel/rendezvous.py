"""Rendezvous of the ranks through a TCP store, which rank 0 hosts (under torchrun, the agent).

Every request to the store has a timeout. torch itself waits forever if the hosting process is frozen, or if the port
belongs to another process that does not answer.
"""

import datetime
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.env import World

T = TypeVar("T")

_POLL = 0.05
_WAIT = 10.0
"""Seconds after which a rank that waits for the others asks again."""
_NAMED = 8
"""Missing ranks that a message names."""
_OTHER_FILES = 1024
"""Open files that a process has beside the store's connections: libraries, data, checkpoints."""


class RendezvousError(RuntimeError):
    """The rendezvous timed out; the message names the missing ranks or the address that does not answer."""


class StoreTimeout(TimeoutError):
    """The store has not answered within the timeout."""


class TimeoutStore:
    """A store whose requests run in a separate thread, so that they can time out."""

    def __init__(self, connect: Callable[[], dist.Store]) -> None:
        """connect: called in that thread."""
        self._tasks: queue.SimpleQueue[tuple[Callable[[dist.Store], object], list[Any], threading.Event] | None]
        self._tasks, self._pending = queue.SimpleQueue(), None
        self._connect = connect
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def ask(self, request: Callable[[dist.Store], T], seconds: float) -> T:
        """request(store).

        Raises:
            StoreTimeout: no answer within `seconds` to this request or the previous one.
            Exception: raised by the request.
        """
        end = time.monotonic() + seconds
        if self._pending and not self._pending.wait(seconds):
            raise StoreTimeout
        answer: list[Any] = []
        self._pending = done = threading.Event()
        self._tasks.put((request, answer, done))
        if not done.wait(max(0.0, end - time.monotonic())):
            raise StoreTimeout
        kind, value = answer
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """Ends the thread, and with it the connection, after all pending requests."""
        self._tasks.put(None)

    def _serve(self) -> None:
        store = None
        while task := self._tasks.get():
            request, answer, done = task
            try:
                store = store or self._connect()
                answer += ["value", request(store)]
            except Exception as error:
                answer += ["error", error]
            done.set()


def is_agent_store(world: World) -> bool:
    """Whether torchrun's agent hosts the store instead of rank 0."""
    return not world.simulated and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_host(world: World) -> str:
    """The process that hosts the store, as text."""
    return "the launcher's store" if is_agent_store(world) else "rank 0"


def join(world: World, timeout: float) -> dist.Store:
    """Waits until every rank has joined, and returns the store that they share.

    The store listens only on the address of the rendezvous; for simulated ranks that is the loopback interface. torch's
    store has no authentication. Keys therefore start with the world's secret, if there is one, so that other users
    cannot read or change them.

    Args:
        timeout: seconds.

    Raises:
        RendezvousError: a rank is missing, or another process uses the port.
    """
    end, where = time.monotonic() + timeout, f"{world.address}:{world.port}"
    wait, answer = datetime.timedelta(seconds=timeout), min(10.0, timeout)
    if world.rank == 0 and not is_agent_store(world):
        _allow_connections(world)
        listening = _listen(world)
        tcp = dist.TCPStore(
            world.address, world.port, world.size, True, wait, False, master_listen_fd=listening.detach()
        )
        store = TimeoutStore(lambda: tcp)
    else:
        _await_port(world, end, timeout)
        store = TimeoutStore(lambda: dist.TCPStore(world.address, world.port, world.size, False, wait, False))

    def shared(tcp: dist.Store) -> dist.Store:
        # The agent's store is kept when the agent restarts the ranks.
        return dist.PrefixStore(f"{world.secret} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp)

    def join_world(tcp: dist.Store) -> dist.Store:
        mine = shared(tcp)
        mine.set(f"rank {world.rank}", "")
        if mine.add("joined", 1) == world.size:
            mine.set("all", "")
        return tcp

    def have_all_joined() -> bool:
        # The store answers once the key is there: a thousand ranks that ask again and again would keep it busy.
        limit = min(_WAIT, max(_POLL, end - time.monotonic()))
        try:
            store.ask(lambda tcp: shared(tcp).wait(["all"], datetime.timedelta(seconds=limit)), limit + answer)
        except dist.DistStoreError:
            return False
        return True

    try:
        # If rank 0 has joined at the last moment, it still gets some time to answer.
        tcp = store.ask(join_world, max(end - time.monotonic(), answer))
        while not have_all_joined():
            if time.monotonic() > end:
                late = store.ask(lambda tcp: _missing(shared(tcp), range(world.size)), answer)
                raise RendezvousError(
                    f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late[:_NAMED]))}"
                    f"{' and more' if len(late) > _NAMED else ''} did not join the rendezvous at {where} within "
                    f"{timeout:g} s (runtime.timeout): dead, frozen, or still preparing data"
                )
    except StoreTimeout:
        raise RendezvousError(
            f"the rendezvous at {where} accepts connections but does not answer within {timeout:g} s "
            f"(runtime.timeout): {store_host(world)} is frozen, or another process has the port; MASTER_PORT sets "
            "another port"
        ) from None
    store.close()
    return shared(tcp)


def _missing(store: dist.Store, ranks: range) -> list[int]:
    """The first ranks that have not joined, and at most one more than a message names, found by halving: the number of
    requests is logarithmic in the world."""
    if not ranks or store.check([f"rank {rank}" for rank in ranks]):
        return []
    if len(ranks) == 1:
        return [ranks[0]]
    half = len(ranks) // 2
    first = _missing(store, ranks[:half])
    return first if len(first) > _NAMED else first + _missing(store, ranks[half:])


def _allow_connections(world: World) -> None:
    """Raises this process' limit of open files: the store has a connection to every rank, and another one to each
    rank's watchdog.

    Raises:
        RendezvousError: the hard limit is below the number of ranks.
    """
    wanted, (soft, hard) = 2 * world.size + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        if hard <= world.size:
            raise RendezvousError(
                f"rank 0 has a connection to each of {world.size:,} ranks, but may have only {hard:,} files open: "
                "raise the hard limit (ulimit -Hn)"
            )
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(world: World) -> socket.socket:
    found = socket.getaddrinfo(world.address, world.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    several_nodes, host = world.local_size < world.size, str(address[0])
    if several_nodes and (host.startswith("127.") or host == "::1"):
        address = ("", world.port)  # /etc/hosts maps this node's own name to the loopback address
    try:
        return socket.create_server(address[:2], family=family, backlog=max(128, world.size))
    except OSError as error:
        raise RendezvousError(
            f"cannot listen on {world.address}:{world.port} for the rendezvous: {error.strerror}; "
            "MASTER_PORT sets another port, MASTER_ADDR another address of the node of rank 0"
        ) from None


def _await_port(world: World, end: float, timeout: float) -> None:
    """Waits until a process listens on the rendezvous port."""
    while True:
        try:
            socket.create_connection((world.address, world.port), max(_POLL, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RendezvousError(
                    f"{store_host(world)} did not open the rendezvous at {world.address}:{world.port} within "
                    f"{timeout:g} s (runtime.timeout): {error.strerror or error}. It is dead, frozen, or still "
                    "preparing data"
                ) from None
        time.sleep(_POLL)
