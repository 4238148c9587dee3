"""Training on preferences: runs, their metrics, the reference, and resuming."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic_preferences
from conf.schema import DataConfig, PreferenceConfig
from corpus.tokenizer import Tokenizer
from parallel.local_launcher import RankFailed
from tests.training import helpers
from training.preferences import REFERENCE_FILE, _read_kept

DPO = ("rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy", "logps_chosen", "logps_rejected")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("preferences")
    file = synthetic_preferences.write(folder / "sums.jsonl", 60)
    text = "User:\nWhat is 12 + 34?\nAssistant:\nThe sum is 56.<|endoftext|>\n7890"
    Tokenizer.train([text] * 2, vocab_size=300, eod_token="<|endoftext|>").save(str(folder / "tokenizer.json"))
    return DataConfig(
        kind="preference",
        files=[str(file)],
        tokenizer=str(folder / "tokenizer.json"),
        cache_dir=str(folder / "cache"),
        valid_fraction=0.2,
    )


def config(data: DataConfig, run_dir: Path, objective: str = "dpo", **train):
    sizes = {"steps": 4, "micro_batch_size": 4, "sequence_length": 48, "objective": objective}
    made = helpers.tiny_config(Path(data.files[0]), run_dir, **(sizes | train))
    made.data, made.eval = data, replace(made.eval, sample_tokens=0)
    made.model.moe.capacity_factor = made.model.moe.eval_capacity_factor = None
    made.optim = replace(made.optim, warmup_steps=1)
    if objective == "dpo":
        made.preference = PreferenceConfig(beta=0.5)
    made.model.reward_head = objective == "reward"
    return made


def evaluations(run_dir: Path) -> list[dict]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "val_loss" in row]


@pytest.fixture(scope="module")
def dpo_run(ranks, data, tmp_path_factory) -> Path:
    """Eight steps at one go."""
    run_dir = tmp_path_factory.mktemp("dpo") / "run"
    assert ranks.run(1, helpers.train, config(data, run_dir, steps=8)) == [0]
    return run_dir


def test_dpo_starts_at_the_reference_and_learns_the_training_pairs(dpo_run):
    rows = helpers.rows(dpo_run)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-4) and rows[0]["logps_chosen"] < -10
    assert rows[-1]["loss"] < 0.6 and rows[-1]["reward_accuracy"] > 0.5
    for row in rows:
        assert set(DPO) <= row.keys() and row["aux_loss"] > 0
        assert row["reward_margin"] == pytest.approx(row["rewards_chosen"] - row["rewards_rejected"], abs=1e-9)
    (held_out,) = evaluations(dpo_run)
    assert {f"val_{name}" for name in DPO} <= held_out.keys() and held_out["val_bits_per_byte"] is None


def test_a_stopped_run_continues_with_the_reference_of_its_start(ranks, data, dpo_run, tmp_path):
    run_dir = tmp_path / "run"
    assert ranks.run(1, helpers.train, config(data, run_dir, steps=8, stop_after=3)) == [0]
    first = (run_dir / REFERENCE_FILE).read_bytes()
    assert ranks.run(2, helpers.train, config(data, run_dir, steps=8, stop_after=4)) == [0, 0]
    assert ranks.run(1, helpers.train, config(data, run_dir, steps=8)) == [0]
    assert (run_dir / REFERENCE_FILE).read_bytes() == first
    for mine, wanted in zip(helpers.rows(run_dir), helpers.rows(dpo_run), strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert mine["logps_chosen"] == pytest.approx(wanted["logps_chosen"], rel=1e-5)


def test_a_resumed_run_is_exactly_the_one_that_was_not_stopped(ranks, data, dpo_run, tmp_path):
    run_dir = tmp_path / "run"
    for stop_after in (5, None):
        assert ranks.run(1, helpers.train, config(data, run_dir, steps=8, stop_after=stop_after)) == [0]
    keys = ("step", "loss", "grad_norm", *DPO)
    mine, wanted = ([[row[key] for key in keys] for row in helpers.rows(path)] for path in (run_dir, dpo_run))
    assert mine == wanted
    (run_dir / REFERENCE_FILE).unlink()
    with pytest.raises(RankFailed, match="cannot be read"):
        ranks.run(1, helpers.train, config(data, run_dir, steps=9))


def test_the_reference_of_other_weights_or_data_is_not_used(tmp_path):
    """At step 0 it is computed again; later that is not possible any more."""
    path, key = tmp_path / REFERENCE_FILE, {"data": "a", "weights": "b", "precision": "fp32"}
    assert _read_kept(path, key, 0) is None and "cannot be read" in _read_kept(path, key, 3)
    np.savez(path, key=np.array(json.dumps(key)), train=np.ones((3, 2)), valid=np.ones((1, 2)))
    for other, at_start, later in (
        (key, True, True),
        (key | {"weights": "c"}, False, True),  # a run that continues cannot know them
        (key | {"precision": "bf16"}, False, True),
        (key | {"data": "c"}, False, False),
    ):
        assert isinstance(_read_kept(path, other, 0), dict) == at_start
        assert isinstance(_read_kept(path, other, 3), dict) == later
    assert "of other preferences" in _read_kept(path, key | {"data": "c"}, 3)


@pytest.mark.parametrize("responses", [2, 3])
def test_a_reward_model_learns_to_rank(ranks, data, tmp_path, responses):
    file = synthetic_preferences.write(tmp_path / "sums.jsonl", 40, responses)
    settings = config(replace(data, files=[str(file)]), tmp_path / "run", "reward", steps=6, micro_batch_size=responses)
    settings = replace(settings, preference=PreferenceConfig(max_responses=responses, center_rewards_coefficient=0.01))
    settings.train.global_batch_size = 4 * responses
    assert ranks.run(1, helpers.train, settings) == [0]
    rows = helpers.rows(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] and set(DPO[:4]) <= rows[0].keys()
    (held_out,) = evaluations(tmp_path / "run")
    assert 0 <= held_out["val_reward_accuracy"] <= 1
