"""A rank that stalls, dies or fails ends the others soon, and all of them say where they were."""

import json
import logging
import os
import re
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from parallel.watchdog import RankStatus, Watchdog, diagnose
from tests.parallel.helpers import started

TIMEOUT = 5.0


@pytest.fixture
def pool():
    with RankPool(3) as pool:
        yield pool


def go_wrong(world: World) -> None:
    time.sleep(600)


def steps(world: World, how: str, culprit: int, log: Path) -> int:
    """Steps with one all-reduce each; in the third the culprit goes wrong."""
    step = 0
    with started(world, ParallelConfig()):
        logging.disable(logging.NOTSET)
        logger = logging.getLogger("switchyard")
        logger.handlers, logger.propagate = [logging.FileHandler(log / f"{world.rank}")], False
        with Watchdog(world, TIMEOUT, lambda: (step, None)):
            for step in range(1, 4):
                if step == 3 and world.rank == culprit:
                    (log / "then").touch()
                    match how:
                        case "stall":
                            go_wrong(world)
                        case "kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                        case "raise":
                            raise RuntimeError("boom")
                dist.all_reduce(torch.ones(1))
    return step


def test_nothing_happens_when_all_is_well(pool, tmp_path):
    for _ in range(2):  # a second life in the same processes
        assert pool.run(3, steps, "well", 0, tmp_path, timeout=60) == [3, 3, 3]
    assert {path.read_text() for path in tmp_path.iterdir()} == {""}


@pytest.mark.parametrize(
    ("how", "culprit", "told", "logs"),
    [
        (
            "stall",
            1,
            r"rank 1 stalled in step 3, at tests/parallel/test_watchdog.py:\d+ \(go_wrong\), in no coll",
            [0, 1, 2],
        ),
        (
            "stall",
            0,
            r"rank 0 stalled in step 3, at tests/parallel/test_watchdog.py:\d+ \(go_wrong\), in no coll",
            [0, 1, 2],
        ),
        (
            "raise",
            2,
            r"rank 2 failed in step 3, at tests/parallel/test_watchdog.py:\d+ \(steps\): RuntimeErr",
            [0, 1, 2],
        ),
        ("kill", 1, r"rank 1 died \(exit code -9\)(.|\n)*rank 1 does not respond", [0, 2]),
        ("kill", 0, r"rank 0 died \(exit code -9\)(.|\n)*rank 0 has died", []),
    ],
)
def test_trouble_ends_all_and_is_explained(pool, tmp_path, how, culprit, told, logs):
    with pytest.raises(RankFailed) as failure:
        pool.run(3, steps, how, culprit, tmp_path, timeout=60)
    assert time.time() - (tmp_path / "then").stat().st_mtime < TIMEOUT + 0.5  # the ranks' ends included
    message = str(failure.value)
    assert re.search(told, message), message
    assert re.search(
        r"step 3 in all_reduce over ranks 0, 1, 2, at tests/parallel/test_watchdog.py:\d+ \(steps\)", message
    )
    for rank in logs:
        text = (tmp_path / str(rank)).read_text()
        assert "failure in step 3" in text and "in steps" in text and 'test_watchdog.py", line' in text
        assert ("in go_wrong" in text) == (how == "stall" and rank == culprit)


def test_diagnosis_by_hand():
    waits = RankStatus(7, "a.py:1 (f)", "all_gather over ranks 0, 1")
    stalls, fails = RankStatus(7, "b.py:2 (g)", None), RankStatus(6, "c.py:3 (h)", None, "KeyError: 'x'")
    waiting = "rank 0 waits in step 7 in all_gather over ranks 0, 1, at a.py:1 (f)"
    assert diagnose({0: waits, 1: stalls}, 2) == (
        f"the job ends: rank 1 stalled in step 7, at b.py:2 (g), in no collective; {waiting}"
    )
    assert diagnose({0: waits}, 3) == f"the job ends: ranks 1, 2 do not respond (dead or frozen); {waiting}"
    closed = "RuntimeError: [/build/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:45775: Connection reset"
    lost = RankStatus(7, "a.py:1 (f)", "all_gather over ranks 0, 1", closed)
    assert diagnose({0: lost}, 2) == (
        "the job ends: rank 1 does not respond (dead or frozen); "
        "rank 0 lost its connection in step 7 in all_gather over ranks 0, 1, at a.py:1 (f)"
    )
    failed = "rank 1 failed in step 6, at c.py:3 (h): KeyError: 'x'"
    assert diagnose({0: waits, 1: fails, 2: stalls}, 3) == f"the job ends: {failed}; {waiting}"


def test_the_reports_of_many_ranks_are_read_in_parts(monkeypatch):
    """Those of two ranks, in different parts, are missing."""
    store, watch = dist.HashStore(), Watchdog(World(0, 150), 0.2)
    questions = []
    monkeypatch.setattr(watch, "_ask", lambda question: (questions.append(question), question(store))[1])
    waits = json.dumps(asdict(RankStatus(7, "a.py:1 (f)", "all_gather over ranks 0, 1")))
    for rank in {*range(150)} - {70, 129}:
        store.set(f"rank {rank}", waits)
    store.add("reports", 148)
    message = watch._collect()
    assert message.startswith("the job ends: ranks 70, 129 do not respond (dead or frozen); rank 0 waits in step 7")
    for rank in (70, 129):
        store.set(f"rank {rank}", waits)
    store.add("reports", 2)
    questions.clear()
    assert "respond" not in watch._collect() and len(questions) == 1 + 2 * 3


def alone(world: World) -> None:
    with Watchdog(world, 0.2, lambda: (0, None)):
        time.sleep(1)


def test_one_rank_waits_for_nobody():
    alone(World())
