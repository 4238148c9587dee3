"""One process of a node does some work for all ranks on it, before the ranks have met.

The process of local rank 0 does the work and sends the result through a Unix socket in Linux's abstract namespace,
which needs no file system and ends with the process; the others are blocked on it. A heartbeat tells a process that
works from one that is frozen. Does not import torch.
"""

import contextlib
import hashlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

from parallel.env import World

_BEAT = 1.0
"""Seconds between two heartbeats."""
_POLL = 0.5
"""Seconds between two calls of `waiting`, and between two attempts to connect."""
_GRACE = 5.0
"""Seconds for which a failed process waits for others to fetch its message, and for which those that have lost it wait
for a signal of their own, which may have ended both."""


class NodeFailure(RuntimeError):
    """The process that works for this node failed; the message names it and says why."""


def node_key(env: Mapping[str, str] = os.environ) -> str | None:
    """What the ranks of one node, of one attempt of a job, have in common and no others; None: the launcher does not
    tell which ranks share a node."""
    if "RANK" in env and "LOCAL_RANK" in env:  # torchrun
        names = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    elif "RANK" not in env and "SLURM_LOCALID" in env:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID", "SLURM_RESTART_COUNT", "SWITCHYARD_STORE_SECRET")
    else:
        return None
    parts = [os.uname().nodename, str(os.getuid()), *(env.get(name, "") for name in names)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def once_per_node(
    world: World,
    key: str,
    work: Callable[[], str],
    *,
    timeout: float,
    waiting: Callable[[str], None] = lambda what: None,
) -> str:
    """The result of `work`, which the process of local rank 0 calls; every rank of the node calls this.

    Args:
        key: `node_key`.
        timeout: seconds without a heartbeat of the working process; the wait itself is not limited.
        waiting: called regularly by the processes that wait; an exception that it raises ends the wait.

    Raises:
        ValueError: raised by `work`, on all ranks of the node.
        NodeFailure: on the others, `work` has raised another exception, or its process has died or is frozen.
    """
    address = f"\0switchyard-{key}"
    if world.local_rank:
        return _receive(address, world, timeout, waiting)
    with _Server(address, world.local_size - 1) as server:
        return server.answer(work)


class _Server:
    """Sends heartbeats, and in the end the result, to the other processes of a node."""

    def __init__(self, address: str, others: int) -> None:
        self._others = others
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listening.bind(address)
        except OSError as error:
            raise NodeFailure(
                f"another process of local rank 0 of the same job runs on {os.uname().nodename} ({error.strerror}): "
                "end it"
            ) from None
        self._listening.listen(max(others, 1))
        self._message = b""
        self._ended, self._sent = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="node", daemon=True)

    def __enter__(self) -> "_Server":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            self._sent.wait(_GRACE)  # after a success the thread serves those that come later

    def answer(self, work: Callable[[], str]) -> str:
        try:
            result = work()
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._end({"error": text, "users": isinstance(error, ValueError)})
            raise
        self._end({"result": result})
        return result

    def _end(self, content: dict[str, object]) -> None:
        self._message = json.dumps(content).encode() + b"\n"
        self._ended.set()

    def _serve(self) -> None:
        clients: list[socket.socket] = []
        missing, beat = self._others, 0.0
        while missing:
            if select.select([self._listening], [], [], _BEAT / 10)[0]:
                client, _ = self._listening.accept()
                client.settimeout(_GRACE)
                if _peer(client) == os.getuid():
                    clients.append(client)
                else:
                    client.close()
            ended = self._ended.is_set()
            if not ended and time.monotonic() < beat + _BEAT:
                continue
            beat = time.monotonic()
            gone = [client for client in clients if not self._send(client) or ended]
            for client in gone:
                client.close()
                clients.remove(client)
            missing -= len(gone)
        self._listening.close()
        self._sent.set()

    def _send(self, client: socket.socket) -> bool:
        """Sends the message, or a heartbeat until there is one. False: the other process has ended or is frozen."""
        try:
            client.sendall(self._message or b"\n")
        except OSError:
            return False
        return True


def _peer(connection: socket.socket) -> int:
    """The user id of the process at the other end."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user


def _receive(address: str, world: World, timeout: float, waiting: Callable[[str], None]) -> str:
    who = f"the process of local rank 0 on {os.uname().nodename}, which works for this node,"
    connection = _connect(address, who, timeout, waiting)
    with contextlib.closing(connection):
        connection.settimeout(_POLL)
        text, heard = b"", time.monotonic()
        while not text.endswith(b"\n") or not text.strip():
            try:
                part = connection.recv(1 << 16)
            except TimeoutError:
                part = None
            except OSError:
                part = b""
            if part == b"":
                _await_signal(waiting)
                raise NodeFailure(f"{who} has died")
            if part:
                text, heard = (text + part).lstrip(b"\n"), time.monotonic()
            elif time.monotonic() - heard > timeout:
                raise NodeFailure(f"{who} has sent no heartbeat for {timeout:.0f} s: dead or frozen")
            waiting("waiting for local rank 0")
    answer = json.loads(text)
    if "result" in answer:
        return answer["result"]
    if answer["users"]:
        raise ValueError(answer["error"])
    raise NodeFailure(f"{who} failed: {answer['error']}")


def _connect(address: str, who: str, timeout: float, waiting: Callable[[str], None]) -> socket.socket:
    end = time.monotonic() + timeout
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
        except OSError:  # it has not started yet
            connection.close()
        else:
            if (user := _peer(connection)) == os.getuid():
                return connection
            connection.close()
            raise NodeFailure(f"a process of another user (uid {user}) has taken the address of {who}")
        if time.monotonic() > end:
            raise NodeFailure(f"{who} has not started within {timeout:.0f} s")
        waiting("waiting for local rank 0")
        time.sleep(_POLL)


def _await_signal(waiting: Callable[[str], None]) -> None:
    """A signal that ended the other process may be on its way to this one: `waiting` then raises."""
    end = time.monotonic() + _GRACE
    while time.monotonic() < end:
        waiting("waiting for local rank 0")
        time.sleep(_POLL)
