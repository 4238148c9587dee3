"""A run on several nodes, simulated on this one: only rank 0 and ranks that fail write to train.log."""

import logging
import os
import re
import signal
import tempfile
import unittest.mock
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config
from parallel.engine import Engine
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.training.helpers import tiny_config, train, write_corpus
from training import output_redirect
from training.output_redirect import redirect_output

WARNING = "something odd on rank"


def on_a_node_of_its_own(world: World, config: Config, temporary: Path, end: str) -> list[str]:
    """Each rank warns in the second step, in which rank 1 comes to its end (rank function for the pool). Returns the
    texts of the logs on this rank's node in mid-run."""
    node = temporary / f"node{world.rank}"
    node.mkdir(exist_ok=True)
    update, logs = Engine.update, []

    def second(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        logs.append(None)
        if len(logs) == 2:
            logging.getLogger("somebody").warning("%s %d", WARNING, world.rank)
            logs[0] = [path.read_text() for path in node.glob("switchyard-*.log")]
            if world.rank == 1 and end == "raise":
                raise RuntimeError("boom")
            if world.rank == 1 and end == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
        return update(engine, *args, **kwargs)

    with (
        unittest.mock.patch.object(Engine, "update", second),
        unittest.mock.patch.object(tempfile, "tempdir", str(node)),
    ):
        assert train(replace(world, local_rank=0, local_size=1), config) == 0
    return logs[0]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(write_corpus(tmp_path), tmp_path / "run", steps=3)


def test_nothing_is_left_of_the_others_when_all_is_well(config: Config, ranks: RankPool, tmp_path: Path) -> None:
    first, (second,) = ranks.run(2, on_a_node_of_its_own, config, tmp_path, "well", timeout=120)
    log = (tmp_path / "run" / "train.log").read_text()
    assert first == [] and f"rank 0 WARNING somebody: {WARNING} 0" in log and f"{WARNING} 1" not in log
    assert f"rank 1 WARNING somebody: {WARNING} 1" in second and f"{WARNING} 0" not in second
    assert not list(tmp_path.glob("node*/*.log"))


def test_a_rank_that_fails_leaves_its_end_in_train_log(config: Config, tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankFailed, match=r"failed in step 2, at .* RuntimeError: boom"):
        pool.run(2, on_a_node_of_its_own, config, tmp_path, "raise", timeout=120)
    log = (tmp_path / "run" / "train.log").read_text()
    (path,) = (tmp_path / "node1").glob("switchyard-run-rank1-*.log")  # with all of it
    assert re.search(rf"--- from the log of rank 1 on {os.uname().nodename}, {path} there, the last \d+ bytes:", log)
    assert log.count(f"rank 1 WARNING somebody: {WARNING} 1") == 1
    assert "rank 1 ERROR switchyard: failure in step 2" in log and ", in second" in log
    assert path.read_text().count("rank 1 ERROR") == log.count("rank 1 ERROR")


def test_a_crash_is_in_train_log(config: Config, tmp_path: Path) -> None:
    """Its stack trace comes from a signal handler, which cannot copy anything."""
    with RankPool(2) as pool, pytest.raises(RankFailed, match=r"rank 1 died \(exit code -11\)"):
        pool.run(2, on_a_node_of_its_own, config, tmp_path, "crash", timeout=120)
    crash = (tmp_path / "run" / "train.log").read_text().split("Fatal Python error: Segmentation fault")[1]
    assert "test_logs_of_nodes.py" in crash and " in second" in crash


def test_only_the_end_of_a_long_log_is_copied_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_redirect, "TAIL_BYTES", 200)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    redirection = redirect_output(3)
    try:
        redirection.attach(tmp_path / "train.log", on_node=True)
        for number in range(10):
            logging.getLogger("somebody").error("line %d", number)  # not an error of this rank
        assert (tmp_path / "train.log").read_bytes() == b""
        logging.getLogger("switchyard").error("the first failure")
        logging.getLogger("switchyard").error("the second")
        (own,) = tmp_path.glob("switchyard-*.log")
        log, header = (tmp_path / "train.log").read_text(), r"--- from the log of rank 3 on .*\n"
        first, second = re.split(header, log)[1:]
        assert len(first) == 200 and own.read_text().endswith(first + second)
        assert "line 9" in first and "line 0" not in first and second.endswith("switchyard: the second\n")
        assert second.count("\n") == 1
    finally:
        redirection.undo()
    assert own.exists()
