"""What the ranks agree on: all stop after the same step, and the run directory is looked at from time to time."""

import os
import signal
import types
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import Config
from parallel.engine import Engine
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, trajectory, write_corpus
from training import agreement
from training.agreement import LOOK_SECONDS, Agreement, severest
from training.console import Console
from training.requeue import Ownership
from training.run_dir import RunDir
from training.signals import FAIL, GO_ON, LEAVE, STOP, StopRequest


def test_the_most_severe_state_by_hand() -> None:
    counts = {(8, 0, 0, 0): GO_ON, (7, 1, 0, 0): STOP, (0, 8, 0, 0): STOP, (6, 1, 1, 0): FAIL, (5, 1, 1, 1): LEAVE}
    for given, state in counts.items():
        assert severest(torch.tensor(given, dtype=torch.float64)) == state


def agreement_of_rank(rank: int, run_dir: Path, console: Console) -> Agreement:
    runtime: Any = types.SimpleNamespace(world=World(rank, 2), device=torch.device("cpu"))
    prepared: Any = types.SimpleNamespace(tokenizer=None)
    directory = RunDir(run_dir, created=False, continued=False, changed=[], overrides=[])
    return Agreement(runtime, directory, Config(), prepared, console, StopRequest(()))


def test_the_run_directory_is_looked_at_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank 0, and sooner where asked to."""
    now, looks, holds = [100.0], [], Ownership.holds
    monkeypatch.setattr(agreement, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Ownership, "holds", lambda owner: bool(looks.append(now[0])) or holds(owner))
    with Console(rank=0, log_path=tmp_path / "train.log") as console:
        main, other = (agreement_of_rank(rank, tmp_path, console) for rank in (0, 1))
        for after in (1.0, LOOK_SECONDS - 0.1, LOOK_SECONDS, LOOK_SECONDS + 1):
            now[0] = 100.0 + after
            assert severest(main.counts()) == severest(other.counts()) == GO_ON
        assert looks == [100.0 + LOOK_SECONDS]
        Ownership(tmp_path)  # another process
        assert severest(main.counts()) == GO_ON and severest(main.counts(look=True)) == LEAVE
        assert severest(main.counts()) == LEAVE  # for good
        assert severest(other.counts(look=True)) == GO_ON and len(looks) == 2


def test_a_directory_that_was_deleted_is_a_failure(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Console(rank=0, log_path=tmp_path / "train.log") as console:
        main = agreement_of_rank(0, run_dir, console)
        for file in run_dir.iterdir():
            file.unlink()
        run_dir.rmdir()
        assert severest(main.counts()) == GO_ON
        with unittest.mock.patch.object(RunDir, "keep_settings"):
            assert severest(main.counts(look=True)) == FAIL
    assert "was deleted" in str(main.storage.message) and (run_dir / "owner").is_file()


def signalled(world: World, config: Config, during: str) -> int:
    """Rank 1 receives a signal in the third step (rank function for the pool).

    Args:
        during: the method of the engine.
    """
    inner, calls = getattr(Engine, during), []

    def with_signal(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if world.rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return inner(engine, *args, **kwargs)

    with unittest.mock.patch.object(Engine, during, with_signal):
        return train(world, config)


@pytest.mark.parametrize(("during", "last"), [("compute_gradients", 3), ("update", 4)])
def test_all_ranks_stop_after_the_same_step(
    during: str, last: int, ranks: RankPool, tmp_path: Path, whole: Path
) -> None:
    """A signal that comes too late for the sum of a step stops the ranks one step later; and the run goes on bit for
    bit."""
    config = tiny_config(whole.parent / "text.jsonl", tmp_path / "run", steps=6)
    told = ranks.run(2, signalled, config, during, timeout=120)
    assert told == [75, 75] and rows(tmp_path / "run")[-1]["step"] == last
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{last:08d}"]
    assert ranks.run(2, train, config, timeout=120) == [0, 0]
    assert trajectory(tmp_path / "run") == trajectory(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The directory of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert ranks.run(2, train, tiny_config(write_corpus(folder), folder / "run", steps=6), timeout=120) == [0, 0]
    return folder / "run"
