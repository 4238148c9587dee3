"""Held-out losses and samples of small texts: the same under every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import MoeConfig
from corpus.prepare import prepare
from corpus.stream import ValidWindows
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import tiny_config, train, with_layout, write_corpus
from training.trainer import Trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(ranks: RankPool, corpus: Path, run_dir: Path, world: int, dense: bool, **degrees: int) -> dict[str, Any]:
    """The last evaluation of a run whose held-out text is three windows, fewer than a micro-batch."""
    few = corpus.parent / "few.txt"
    few.write_text(" ".join(f"word{i % 7} {i}" for i in range(20)))
    config = tiny_config(corpus, run_dir, steps=2, micro_batch_size=4, global_batch_size=16, sequence_length=63)
    config.model.num_layers = 4
    config.model.moe = MoeConfig(num_experts=0) if dense else MoeConfig(num_experts=4, eval_capacity_factor=0.75)
    config.data.valid_files, config.data.valid_fraction = [str(few)], 0.02
    config.eval.every, config.checkpoint.every, config.eval.sample_tokens = 1, 1, 60
    prepared = prepare(config.data, vocab_size=config.model.vocab_size, sequence_length=63)
    assert len(ValidWindows(prepared, sequence_length=63, document_mask=config.data.document_mask)) == 3
    config = with_layout(config, **degrees)
    assert ranks.run(world, train, config, timeout=120.0) == [0] * world
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line][-1]


@pytest.mark.parametrize(
    ("world", "degrees", "dense"),
    [(2, {}, False), (4, {}, False), (2, {"pp": 2, "vpp": 2}, False), (2, {"tp": 2}, True)],
    ids=str,
)
def test_few_windows_are_evaluated_alike(
    world: int, degrees: dict[str, int], dense: bool, corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """And a sample longer than 63 tokens, which tp=2 does not divide, is written at the end."""
    wanted = run(ranks, corpus, tmp_path / "one", 1, dense)
    got = run(ranks, corpus, tmp_path / "run", world, dense, **degrees)
    assert got["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-5)
    samples = [
        (tmp_path / name / "train.log").read_text().split("held-out loss")[-1].split("run directory")[0]
        for name in ("one", "run")
    ]
    assert samples[0] == samples[1]


def test_a_checkpoint_is_written_before_an_evaluation(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=4)
    config.eval.every = config.checkpoint.every = 2
    assert ranks.run(1, fail_in_evaluation, config, timeout=120.0) == [True]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


def fail_in_evaluation(world: World, config: Any) -> bool:
    def fail(self: Trainer, batches: int | None) -> None:
        raise RuntimeError("no evaluation here")

    original, Trainer._evaluate = Trainer._evaluate, fail
    try:
        train(world, config)
    except RuntimeError as error:
        return "no evaluation here" in str(error)
    finally:
        Trainer._evaluate = original
    return False
