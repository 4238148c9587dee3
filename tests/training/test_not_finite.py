"""Numbers that are not finite on one of two ranks for good: both end, soon and alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conf.schema import CheckpointConfig, Config, GuardConfig
from parallel import optimizer_state
from parallel.engine import Engine
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, write_corpus


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run", steps=1000)
    config.guard = GuardConfig(max_skipped=3)
    config.checkpoint = CheckpointConfig(every=2)
    return config


@contextmanager
def after(name: str, act: Any) -> Iterator[None]:
    """Engine.NAME, followed by act(engine, number of the call, result), whose result counts."""
    inner, calls = getattr(Engine, name), []

    def method(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return act(engine, len(calls), inner(engine, *args, **kwargs))

    with mock.patch.object(Engine, name, method):
        yield


def with_losses(world: World, config: Config) -> int:
    """From the third step on rank 1's losses are NaN (rank function for the pool)."""

    def spoil(engine: Engine, call: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part * float("nan") for part in parts] if world.rank == 1 and call > 2 else parts

    with after("run_forward", spoil):
        return train(world, config)


def with_moments(world: World, config: Config) -> int:
    """Within the third step one of rank 1's moments becomes NaN (rank function for the pool)."""

    def spoil(engine: Engine, call: int, result: Any) -> Any:
        if world.rank == 1 and call == 3:
            piece = next(iter(optimizer_state._optimizer_shards(engine).values()))
            piece.inner.state[piece.master]["exp_avg"].fill_(float("nan"))
        return result

    with after("run_forward", spoil):
        return train(world, config)


def test_losses(ranks: RankPool, config: Config) -> None:
    assert ranks.run(2, with_losses, config, timeout=120) == [1, 1]
    run = Path(config.run.dir or "")
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]  # the sixth, one skipped too many, ends the run
    log = (run / "train.log").read_text()
    assert "step 6: update skipped, not finite: loss (4 in a row, 3 allowed). The newest checkpoint is untouched" in log


def test_moments(ranks: RankPool, config: Config) -> None:
    assert ranks.run(2, with_moments, config, timeout=120) == [1, 1]
    run = Path(config.run.dir or "")
    log = (run / "train.log").read_text()
    (told,) = [line for line in log.splitlines() if "every later update" in line]
    assert "step 4: weights of " in told  # which the update of the third step has spoilt
    assert "last good checkpoint is step 2" in told
