"""A trained model under other ranks, layouts and backends than it was trained with: evaluate and generate."""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from conf.commands import EvaluateConfig, GenerateConfig, InferenceModelConfig, InferenceMoeConfig
from conf.schema import ParallelConfig
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.training.helpers import start, tiny_config, train, write_corpus
from training.console import Console

LIMIT = 120.0


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps on one rank."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(write_corpus(folder), folder / "run", steps=2)
    config.eval.sample_tokens = 0
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    return folder / "run"


def command_of_rank(world: World, name: str, settings: Any) -> tuple[str, list[float]]:
    """What a rank of `python -m launch.<name>` prints, and the held-out losses that it finds (rank function)."""
    losses: list[float] = []
    held_out = Console.held_out

    def noted(console: Console, row: dict[str, Any], *rest: Any) -> None:
        losses.append(row["val_loss"])
        held_out(console, row, *rest)

    run = getattr(importlib.import_module(f"launch.{name}"), f"{name}_rank")
    with tempfile.TemporaryFile() as file, patch.object(Console, "held_out", noted):
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            assert run(world, settings) == 0
            sys.stdout.flush()
        finally:
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return file.read().decode(), losses


HERE = {"precision": "fp32", "model": InferenceModelConfig(moe=InferenceMoeConfig(backend="loop"))}
LAYOUTS = [(1, ParallelConfig()), (2, ParallelConfig()), (2, ParallelConfig(tp=2))]


def test_evaluate_finds_the_same_under_every_layout_and_prints_it_once(ranks: RankPool, trained: Path) -> None:
    found = []
    for size, parallel in LAYOUTS:
        settings = EvaluateConfig(checkpoint=str(trained), parallel=parallel, **HERE)
        (text, losses), *others = ranks.run(size, command_of_rank, "evaluate", settings, timeout=LIMIT)
        assert text.count("held-out loss") == 1 and [other for other, _ in others] == [""] * (size - 1)
        found.append(losses[0])
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-6)


def test_generate_writes_the_same_under_every_layout_and_once(ranks: RankPool, trained: Path) -> None:
    texts = []
    for size, parallel in LAYOUTS:
        settings = GenerateConfig(
            checkpoint=str(trained), prompt="The ", max_tokens=6, temperature=0.0, parallel=parallel, **HERE
        )
        (text, _), *others = ranks.run(size, command_of_rank, "generate", settings, timeout=LIMIT)
        assert text.startswith("The ") and [other for other, _ in others] == [""] * (size - 1)
        texts.append(text)
    assert texts[0] == texts[1] == texts[2]


def test_nproc_ranks_of_the_command_print_once(trained: Path) -> None:
    words = ["precision=fp32", "parallel.tp=2", "model.moe.backend=loop", "batches=1", f"checkpoint={trained}"]
    process = start([sys.executable, "-m", "launch.evaluate", *words], NPROC="2")
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    assert len(re.findall("held-out loss", out)) == 1


def test_a_backend_that_only_the_training_machine_has(ranks: RankPool, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(run)], check=True, timeout=60)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["moe"]["backend"] = "triton"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = EvaluateConfig(checkpoint=str(run), batches=1, **HERE)
    with pytest.raises(RankFailed, match=r"triton.*model\.moe\.backend="):
        ranks.run(1, command_of_rank, "evaluate", replace(asked, model=InferenceModelConfig()), timeout=LIMIT)
    ((text, _),) = ranks.run(1, command_of_rank, "evaluate", asked, timeout=LIMIT)
    assert "held-out loss" in text
