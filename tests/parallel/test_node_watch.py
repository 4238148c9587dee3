"""One rank of each node asks the store for all ranks of the node."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from conf.schema import ParallelConfig
from parallel import node_watch
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.node_watch import NodeWatch
from parallel.rendezvous import StoreTimeout, TimeoutStore
from parallel.watchdog import Watchdog
from tests.parallel.helpers import started

LOOKS = 4
LIMIT = 60.0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def requests(world: World, nodes: int) -> int:
    """How often this rank asks the store while its node looks LOOKS times (rank function for the pool)."""
    per_node = world.size // nodes
    node, local_rank = divmod(world.rank, per_node)
    asked, ask = [], TimeoutStore.ask

    def counted(store: TimeoutStore, request: Any, seconds: float) -> Any:
        asked.append(None)
        return ask(store, request, seconds)

    with (
        started(world, ParallelConfig()),
        mock.patch.object(node_watch, "node_name", lambda: f"node {node}"),
        mock.patch.object(node_watch, "PATIENCE", 1000),  # a machine that is busy makes no rank impatient
        mock.patch.object(TimeoutStore, "ask", counted),
        Watchdog(replace(world, local_rank=local_rank, local_size=per_node), 10.0, lambda: (0, time.time())) as watch,
    ):
        looks = watch._node
        wait_until(lambda: looks._questions > 0)  # the file is found
        before, first = len(asked), looks._questions
        wait_until(lambda: looks._questions >= first + LOOKS)
        count = len(asked) - before
        dist.barrier()  # none leaves earlier
        return count


def test_what_the_store_serves_does_not_grow_with_the_ranks_of_a_node(ranks: RankPool) -> None:
    served = {}
    for size, nodes in ((2, 1), (6, 1), (6, 3)):
        of_ranks = ranks.run(size, requests, nodes, timeout=120)
        served[size, nodes] = sum(of_ranks)
        assert sum(count > 0 for count in of_ranks) == nodes
    for (_, nodes), count in served.items():
        assert LOOKS * nodes <= count <= (LOOKS + 2) * nodes


class Store:
    """Answers for all ranks, and counts the questions about failures."""

    def __init__(self) -> None:
        self.store, self.questions, self.silent = dist.HashStore(), 0, False

    def ask(self, question: Callable[[Any], Any]) -> Any:
        if self.silent:
            raise StoreTimeout
        return question(self)

    def check(self, keys: list[str]) -> bool:
        self.questions += keys == ["failure"]
        return self.store.check(keys)

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        return self.store.get(key)


@pytest.fixture
def store() -> Store:
    return Store()


def watches(store: Store, period: float = 10.0) -> tuple[NodeWatch, NodeWatch]:
    asks, reads = (NodeWatch(World(rank, 2, rank, 2), period, store.ask) for rank in (0, 1))
    return asks, reads


def test_a_failure_reaches_the_other_ranks_of_the_node(store: Store) -> None:
    asks, reads = watches(store)
    assert reads.pause < asks.pause
    assert asks.look() == (False, True) and reads.look() == (False, True)
    assert reads.look() == (False, False)  # nothing new
    store.set("failure", "")
    assert reads.look() == (False, False) and asks.look() == (True, True) and reads.look() == (True, True)
    assert store.questions == 2
    path = Path(str(reads._path))
    asks.close()
    assert not path.exists() and reads.look() == (True, True) and store.questions == 3  # now it asks itself


def test_a_store_that_is_silent_or_gone(store: Store) -> None:
    asks, reads = watches(store)
    assert asks.look() == reads.look() == (False, True)
    store.silent = True
    assert asks.look() == reads.look() == (False, False)
    store.silent = False
    with mock.patch.object(store, "check", side_effect=RuntimeError("connection closed")):
        assert asks.look() == reads.look() == (True, False)
    asks.close()


def test_a_rank_that_asks_no_more_is_not_waited_for(store: Store) -> None:
    """It is frozen: the others ask by themselves, as often as it would have done."""
    period = 0.02
    asks, reads = watches(store, period)
    asks.look()
    assert reads.look() == (False, True)
    before = store.questions
    wait_until(lambda: reads.look() == (False, True))
    assert store.questions == before + 1
    assert reads.look() == (False, False) and store.questions == before + 1
    wait_until(lambda: reads.look() == (False, True))
    asks.look()  # and back
    assert reads.look() == (False, True)
    questions = store.questions
    assert reads.look() == (False, False) and store.questions == questions
    asks.close()


def test_without_a_file_every_rank_asks(store: Store) -> None:
    with mock.patch.object(node_watch.tempfile, "mkstemp", side_effect=OSError("no room")):
        asks, reads = watches(store)
    assert asks.look() == reads.look() == (False, True) and store.questions == 2
