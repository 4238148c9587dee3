"""Where the ranks find each other: a store that rank 0 (under torchrun, the launcher) keeps at an address and a port.
Nothing that is asked of it is waited for without limit: torch itself waits for ever when the process at the other end
is frozen, or when the port belongs to another process that says nothing."""

import datetime
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from parallel.env import World

_POLL = 0.05


class RendezvousError(RuntimeError):
    """The ranks did not find each other within the time limit; the message says which are missing, or which address
    does not answer."""


class StoreTimeout(TimeoutError):
    """The store has not answered within the time limit."""


class TimeoutStore:
    """A store that is asked by a thread of its own, so that whoever wants the answer can stop waiting."""

    def __init__(self, connect: Callable[[], dist.Store]) -> None:
        """connect: is called in that thread."""
        self._tasks: queue.SimpleQueue[tuple[Callable[[dist.Store], Any], list[Any], threading.Event] | None]
        self._tasks, self._pending = queue.SimpleQueue(), None
        self._connect = connect
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def ask(self, question: Callable[[dist.Store], Any], seconds: float) -> Any:
        """question(store).

        Raises:
            Silent: no answer within `seconds`, to this question or to the one before.
            Exception: what the question raised.
        """
        end = time.monotonic() + seconds
        if self._pending and not self._pending.wait(seconds):
            raise StoreTimeout
        answer: list[Any] = []
        self._pending = done = threading.Event()
        self._tasks.put((question, answer, done))
        if not done.wait(max(0.0, end - time.monotonic())):
            raise StoreTimeout
        kind, value = answer
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """Ends the thread, and with it the connection, once all questions are answered."""
        self._tasks.put(None)

    def _serve(self) -> None:
        store = None
        while task := self._tasks.get():
            question, answer, done = task
            try:
                store = store or self._connect()
                answer += ["value", question(store)]
            except Exception as error:
                answer += ["error", error]
            done.set()


def is_agent_store(world: World) -> bool:
    """Whether torchrun's agent keeps the store, and not rank 0."""
    return not world.simulated and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_host(world: World) -> str:
    """Whose silence it is, in words."""
    return "the launcher's store" if is_agent_store(world) else "rank 0"


def join(world: World, timeout: float) -> dist.Store:
    """Waits until every rank is there, and returns the store that they share.

    The store listens on the address that the ranks know alone: of simulated ranks the loopback interface. Keys begin
    with the world's secret, where there is one: torch's store asks nobody who they are, so that what another user
    may not read or change must have a name that he does not know.

    Args:
        timeout: seconds.

    Raises:
        RendezvousError: a rank is missing, or the port is somebody else's.
    """
    end, where = time.monotonic() + timeout, f"{world.address}:{world.port}"
    wait, answer = datetime.timedelta(seconds=timeout), min(10.0, timeout)
    if world.rank == 0 and not is_agent_store(world):
        listening = _listen(world)
        tcp = dist.TCPStore(
            world.address, world.port, world.size, True, wait, False, master_listen_fd=listening.detach()
        )
        store = TimeoutStore(lambda: tcp)
    else:
        _await_port(world, end, timeout)
        store = TimeoutStore(lambda: dist.TCPStore(world.address, world.port, world.size, False, wait, False))

    def shared(tcp: dist.Store) -> dist.Store:
        # A launcher's store outlives the ranks that it starts again.
        return dist.PrefixStore(f"{world.secret} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp)

    def arrive(tcp: dist.Store) -> dist.Store:
        mine = shared(tcp)
        mine.set(f"rank {world.rank}", "")
        if mine.add("arrived", 1) == world.size:
            mine.set("all", "")
        return tcp

    def missing(tcp: dist.Store) -> list[int]:
        return [rank for rank in range(world.size) if not shared(tcp).check([f"rank {rank}"])]

    try:
        # Rank 0 may have come at the last moment, and is to have the time to answer.
        tcp = store.ask(arrive, max(end - time.monotonic(), answer))
        while not store.ask(lambda tcp: shared(tcp).check(["all"]), max(end - time.monotonic(), answer)):
            if time.monotonic() > end:
                late = store.ask(missing, answer)
                raise RendezvousError(
                    f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late[:8]))}"
                    f"{' and more' if len(late) > 8 else ''} did not come to {where}, where the ranks meet, within "
                    f"{timeout:g} s (runtime.timeout): dead, frozen, or still preparing data"
                )
            time.sleep(_POLL)
    except StoreTimeout:
        raise RendezvousError(
            f"{where}, where the ranks meet, takes connections and does not answer within {timeout:g} s "
            f"(runtime.timeout): {store_host(world)} is frozen, or another process has the port; MASTER_PORT sets "
            "another port"
        ) from None
    store.close()
    return shared(tcp)


def _listen(world: World) -> socket.socket:
    found = socket.getaddrinfo(world.address, world.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    several_nodes = world.local_size < world.size
    if several_nodes and (address[0].startswith("127.") or address[0] == "::1"):
        address = ("", world.port)  # /etc/hosts gives this node's own name the loopback address
    try:
        return socket.create_server(address[:2], family=family, backlog=max(128, world.size))
    except OSError as error:
        raise RendezvousError(
            f"{world.address}:{world.port}, where the ranks are to meet, cannot be listened on: {error.strerror}; "
            "MASTER_PORT sets another port, MASTER_ADDR another address of the node of rank 0"
        ) from None


def _await_port(world: World, end: float, timeout: float) -> None:
    """Until somebody listens there."""
    while True:
        try:
            socket.create_connection((world.address, world.port), max(_POLL, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RendezvousError(
                    f"{store_host(world)} did not come to {world.address}:{world.port}, where the ranks meet, within "
                    f"{timeout:g} s (runtime.timeout): {error.strerror or error}. It is dead, frozen, or still "
                    "preparing data"
                ) from None
        time.sleep(_POLL)
