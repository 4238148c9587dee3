"""A run of several ranks in which one of them hangs, not in a collective but in its data."""

import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from conf.schema import Config
from corpus.stream import TrainStream
from parallel.env import World
from parallel.local_launcher import RankFailed, run_ranks
from tests.training.helpers import command_line, start, tiny_config, train, write_corpus

TIMEOUT = 12.0
"""Enough for two ranks to start on a busy machine: within it they also have to find each other."""


def hang_in_data(world: World, config: Config) -> int:
    """Rank 1 waits for ever for the first sample of the third step, which a thread reads."""
    sample = TrainStream.sample

    def stuck(self: TrainStream, index: int) -> dict:
        if world.rank == 1 and index >= 2 * config.train.global_batch_size:
            time.sleep(600)
        return sample(self, index)

    TrainStream.sample = stuck  # no need to put it back: this ends the ranks
    return train(world, config)


def test_a_rank_without_data_ends_the_run(tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run")
    config.runtime.timeout = TIMEOUT
    with pytest.raises(RankFailed) as failure:
        run_ranks(2, hang_in_data, config, timeout=120)
    message = str(failure.value)
    assert re.search(r"rank 1 stalled in step 3, at corpus/read_ahead.py:\d+ \(next\), in no coll", message)
    # Rank 0 has done its part of the step.
    waits = r"rank 0 waits in step 3 in the reduction of gradients .* over ranks 0, 1, at parallel/engine.py:"
    assert re.search(waits, message), message
    assert time.time() - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime < TIMEOUT + 0.5
    log = (tmp_path / "run" / "train.log").read_text()
    for rank, function in ((0, "compute_gradients"), (1, "stuck")):
        record = log.split(f"rank {rank} ERROR switchyard: failure in step")[1].split(" ERROR ")[0]
        assert f", in {function}" in record
    assert log.count("the job ends: rank 1 stalled in step") == 2


def test_the_death_of_a_rank_is_one_message(tmp_path: Path) -> None:
    command = command_line(write_corpus(tmp_path), tmp_path / "run", "train.steps=100000", "optim.schedule=constant")
    process = start(command, NPROC="2")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if one.ppid() != process.pid]
    assert len(ranks) == 2
    ranks[1].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(r"switchyard: error: rank \d (died \(exit code -9\)|failed).*\n", errors), errors


FAILING = """
import runpy
from parallel.engine import Engine
def update(*args, **kwargs):
    raise RuntimeError("boom")
Engine.update = update
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def test_an_error_that_nobody_foresaw_is_one_message(tmp_path: Path) -> None:
    settings = command_line(write_corpus(tmp_path), tmp_path / "run")[3:]
    process = start([sys.executable, "-c", FAILING, *settings])
    _, errors = process.communicate(timeout=120)
    log = tmp_path / "run" / "train.log"
    assert process.returncode == 1
    assert errors == f"switchyard: error: RuntimeError: boom; the traceback is in {log}\n"
    assert "Traceback" in log.read_text() and "in update" in log.read_text()
