"""One process of a node works for all of its ranks."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.env import World
from parallel.node_sharing import node_key, once_per_node

RANK = """
import sys, time
from pathlib import Path
from parallel import node_sharing
from parallel.env import World
from parallel.node_sharing import NodeFailure, once_per_node
node_sharing._GRACE = 1.0
rank, key, folder, what = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
def work():
    (folder / f"worked{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    if what == "value":
        raise ValueError("no such file: corpus.txt")
    if what == "other":
        raise MemoryError("too much")
    return "prepared " * 100_000
def waiting(text):
    (folder / f"waits{rank}").touch()
try:
    timeout = 3 if what == "frozen" else 60
    print(len(once_per_node(World(rank, 3, rank, 3), key, work, timeout=timeout, waiting=waiting)))
except (ValueError, NodeFailure, MemoryError) as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit()
if rank == 0:  # as it would go on to train
    while not (folder / "served").exists():
        time.sleep(0.01)
"""


class Node:
    """Three ranks of a node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.ranks = folder, uuid.uuid4().hex, dict[int, subprocess.Popen[str]]()

    def start(self, *ranks: int, what: str) -> None:
        for rank in ranks:
            command = [sys.executable, "-c", RANK, str(rank), self.key, str(self.folder), what]
            self.ranks[rank] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def await_file(self, name: str) -> None:
        end = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < end, name
            time.sleep(0.01)

    def outputs(self) -> dict[int, str]:
        ranks = sorted(self.ranks, reverse=True)
        told = {rank: self.ranks[rank].communicate(timeout=60)[0].strip() for rank in ranks if rank}
        (self.folder / "served").touch()
        return {0: self.ranks[0].communicate(timeout=60)[0].strip(), **told}


@pytest.fixture
def node(tmp_path: Path):
    node = Node(tmp_path)
    yield node
    for process in node.ranks.values():
        process.kill()
        process.communicate()


def test_one_works_and_the_others_get_the_result(node: Node) -> None:
    node.start(1, 2, what="result")  # before there is anyone to ask
    node.await_file("waits1")
    node.start(0, what="result")
    node.await_file("worked0")
    (node.folder / "go").touch()
    assert node.outputs() == dict.fromkeys((0, 1, 2), "900000")
    assert not (node.folder / "worked1").exists() and not (node.folder / "worked2").exists()


def test_one_that_comes_late_gets_the_result_too(node: Node) -> None:
    (node.folder / "go").touch()
    node.start(0, 1, what="result")
    assert node.ranks[1].communicate(timeout=60)[0] == "900000\n"
    del node.ranks[1]
    node.start(2, what="result")
    assert node.outputs() == {0: "900000", 2: "900000"}


NAMED = f"NodeFailure: the process of local rank 0 on {os.uname().nodename}, which works for this node,"


@pytest.mark.parametrize(
    ("what", "own", "others"),
    [
        ("value", "ValueError: no such file: corpus.txt", "ValueError: no such file: corpus.txt"),
        ("other", "MemoryError: too much", f"{NAMED} failed: MemoryError: too much"),
    ],
)
def test_a_failure_is_everyones(node: Node, what: str, own: str, others: str) -> None:
    node.start(0, 1, 2, what=what)
    node.await_file("worked0")
    (node.folder / "go").touch()
    assert node.outputs() == {0: own, 1: others, 2: others}


def test_a_process_that_dies_or_freezes_is_named(node: Node) -> None:
    node.start(0, what="result")
    node.await_file("worked0")
    node.start(1, what="frozen")
    node.await_file("waits1")
    node.ranks[0].send_signal(signal.SIGSTOP)
    assert node.ranks[1].communicate(timeout=60)[0] == f"{NAMED} has sent no heartbeat for 3 s: dead or frozen\n"
    node.ranks[0].send_signal(signal.SIGCONT)
    node.start(2, what="result")
    node.await_file("waits2")
    node.ranks[0].kill()
    assert node.ranks[2].communicate(timeout=60)[0] == f"{NAMED} has died\n"


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    def waiting(what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once_per_node(World(1, 2, 1, 2), uuid.uuid4().hex, never, timeout=60, waiting=waiting)


never: Callable[[], str] = lambda: pytest.fail("another rank works")  # noqa: E731

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29400", "GROUP_RANK": "0"}
STEP = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_ranks_of_a_node_and_an_attempt_have_one_key() -> None:
    for env, own in ((TORCHRUN, ("RANK", "LOCAL_RANK")), (STEP, ("SLURM_PROCID", "SLURM_LOCALID"))):
        key = node_key(env)
        assert key and node_key(env | dict.fromkeys(own, "7")) == key
        assert all(node_key(env | {name: "7"}) != key for name in env if name not in own)
    assert node_key(STEP | {"SLURM_RESTART_COUNT": "1"}) != node_key(STEP)
    assert node_key(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"}) != node_key(TORCHRUN)
    # It cannot be told which ranks share a node.
    assert node_key({"RANK": "1", "WORLD_SIZE": "2", **STEP}) is None and node_key({}) is None
