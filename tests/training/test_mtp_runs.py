"""Whole runs with multi-token prediction: what is logged, and checkpoints under other layouts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf.schema import Config
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, trajectory, with_layout, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("mtp"))


def config_of(corpus: Path, run_dir: Path, layers: int = 2, **changed: Any) -> Config:
    config = tiny_config(corpus, run_dir, **changed)
    model = replace(config.model, mtp_num_layers=layers, mtp_loss_scaling_factor=0.3 if layers else 0.1)
    return replace(config, model=model, data=replace(config.data, document_mask=True))


def evaluations(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in lines if "val_loss" in row]


@pytest.fixture(scope="module")
def whole(corpus: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on one rank without an interruption."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert ranks.run(1, train, config_of(corpus, run_dir, steps=12), timeout=120.0) == [0]
    return run_dir


def test_its_loss_is_a_metric_of_its_own(whole: Path) -> None:
    logged = rows(whole)
    assert all(4 < row["mtp_loss"] < 6 for row in logged) and logged[-1]["mtp_loss"] < logged[0]["mtp_loss"]
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    shown = {
        tag: [event.value for event in events.Scalars(f"train/{tag}")]
        for tag in ("mtp_loss", "mtp_loss_1", "mtp_loss_2")
    }
    assert shown["mtp_loss"] == pytest.approx([row["mtp_loss"] for row in logged], rel=1e-6)
    assert shown["mtp_loss"] == pytest.approx(
        [(a + b) / 2 for a, b in zip(shown["mtp_loss_1"], shown["mtp_loss_2"], strict=True)], rel=1e-6
    )
    series = {tag for tag in events.Tags()["scalars"] if tag.startswith("moe/")}
    assert {tag.split("/")[1] for tag in series} == {"layer_01", "layer_02", "layer_03"}


def test_the_first_loss_and_no_metric_are_those_of_a_run_without(
    whole: Path, corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """The next token's loss at the initial weights, which do not depend on the further layers."""
    assert ranks.run(1, train, config_of(corpus, tmp_path / "run", layers=0, steps=2), timeout=120.0) == [0]
    without = rows(tmp_path / "run")
    assert without[0]["loss"] == rows(whole)[0]["loss"] and without[0]["grad_norm"] != rows(whole)[0]["grad_norm"]
    assert without[1]["loss"] != rows(whole)[1]["loss"]  # the embedding has other gradients
    assert "mtp_loss" not in without[0]


@pytest.mark.parametrize(
    ("count", "first", "then"),
    [
        (1, {}, {}),
        (2, {"pp": 2}, {"tp": 2, "sequence_parallel": True}),
        (2, {"cp": 2}, {"ep": 2}),
    ],
    ids=["one rank", "pp2 to tp2", "cp2 to ep2"],
)
def test_a_run_continues_under_another_layout(
    count: int, first: dict[str, Any], then: dict[str, Any], whole: Path, corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for stop, degrees in ((6, first), (None, then)):
        config = with_layout(config_of(corpus, run_dir, steps=12, stop_after=stop), **degrees)
        assert ranks.run(count, train, config, timeout=120.0) == [0] * count
    if count == 1:
        assert trajectory(run_dir) == trajectory(whole)
    for key in ("loss", "mtp_loss", "grad_norm"):
        assert [row[key] for row in rows(run_dir)] == pytest.approx([row[key] for row in rows(whole)], rel=1e-4)
    assert evaluations(run_dir)[-1] == pytest.approx(evaluations(whole)[-1], rel=1e-4)
