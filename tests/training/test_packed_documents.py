"""Runs with data.packing_strategy=best_fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import Config
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, trajectory, with_layout, write_corpus

LIMIT = 300.0


def packed(corpus: Path, run_dir: Path, *, strategy: str = "best_fit") -> Config:
    config = tiny_config(corpus, run_dir, steps=6)
    config.data = replace(config.data, packing_strategy=strategy, document_mask=True)
    return config


def assignments(run_dir: Path) -> list[int]:
    """Of the sparse layer, in each step."""
    lines = (run_dir / "expert_load.jsonl").read_text().splitlines()
    return [sum(json.loads(line)["assignments"]) for line in lines]


def test_stopped_and_under_another_layout_it_is_the_same_run(ranks: RankPool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    assert ranks.run(1, train, packed(corpus, tmp_path / "run"), timeout=LIMIT) == [0]
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"best-fit packing: \d+ documents in \d+ sequences, \d+\.\d+% padding; ", log)
    stopped = packed(corpus, tmp_path / "stopped")
    assert ranks.run(1, train, replace(stopped, train=replace(stopped.train, stop_after=3)), timeout=LIMIT) == [0]
    assert ranks.run(1, train, stopped, timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "stopped") == trajectory(tmp_path / "run")
    losses = {}
    for name, sizes in {"run": None, "ep2": {"ep": 2}, "tp2": {"tp": 2}}.items():
        if sizes:
            other = with_layout(packed(corpus, tmp_path / name), **sizes)
            assert ranks.run(2, train, other, timeout=LIMIT) == [0, 0]
        losses[name] = [row["loss"] for row in rows(tmp_path / name)]
    assert losses["ep2"] == pytest.approx(losses["run"], rel=1e-5)
    assert losses["tp2"] == pytest.approx(losses["run"], rel=1e-5)
    assert ranks.run(1, train, packed(corpus, tmp_path / "joined", strategy="concatenate"), timeout=LIMIT) == [0]
    assert [row["loss"] for row in rows(tmp_path / "joined")] != losses["run"]
    # Padded positions are no tokens: no expert gets them.
    places = 8 * 32 * Config().model.moe.top_k
    assert assignments(tmp_path / "joined") == [places] * 6
    assert 0.9 * 6 * places < sum(assignments(tmp_path / "run")) < 6 * places
