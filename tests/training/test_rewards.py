"""Reward models: scores of one and of several, evaluation, and export for sequence classification."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import synthetic_preferences
from conf.commands import EvaluateConfig, GenerateConfig
from conf.score_config import ScoreConfig
from corpus.documents import Row
from corpus.tokenizer import Tokenizer
from launch.score import main, scored
from tests.models.hf.helpers import in_rank, run_export
from tests.training.test_preferences import config, data  # noqa: F401
from tests.training.test_runs import printed

ROWS = [
    {"messages": [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "The sum is 3."}]},
    {"prompt": "What is 1 + 2?", "response": "I do not know."},
    {"prompt": [{"role": "user", "content": "What is 1 + 2?"}], "response": "3"},
]
TEXTS = [
    "User:\nWhat is 1 + 2?\nAssistant:\nThe sum is 3.<|endoftext|>\n",
    "What is 1 + 2?I do not know.<|endoftext|>",
    "User:\nWhat is 1 + 2?\nAssistant:\n3<|endoftext|>\n",
]


@pytest.fixture(scope="module")
def run_dir(ranks, data, tmp_path_factory) -> Path:  # noqa: F811
    from tests.training import helpers

    folder = tmp_path_factory.mktemp("reward")
    settings = config(data, folder / "run", "reward", steps=6)
    settings.model.moe = replace(settings.model.moe, top_k=2, every=1)
    settings.checkpoint = replace(settings.checkpoint, every=3)
    assert ranks.run(1, helpers.train, settings) == [0]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "run"


def score(ranks, run_dir, output, checkpoint, **given):
    given = {"input": str(run_dir.parent / "rows.jsonl"), "precision": "fp32"} | given
    settings = ScoreConfig(checkpoint=checkpoint, output=str(output), **given)
    code, message = ranks.run(1, in_rank, main, settings)[0]
    if code:
        raise ValueError(message)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_scores_are_those_of_transformers(ranks, run_dir, tmp_path):
    import transformers

    code, message = run_export(ranks, run_dir, tmp_path / "exported", precision="fp32")
    assert code == 0 and "verified" in message, message
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert theirs.config.num_labels == 1
    tokenizer = Tokenizer.load(str(run_dir / "tokenizer.json"), "<|endoftext|>")
    got = score(ranks, run_dir, tmp_path / "scores.jsonl", str(run_dir))
    for row, given, text in zip(got, ROWS, TEXTS, strict=True):
        ids = torch.tensor([tokenizer.encode_with_special(text)[0]])
        assert row["reward"] == pytest.approx(theirs(input_ids=ids).logits.item(), abs=1e-5)
        assert {key: row[key] for key in given} == given


def test_an_ensemble_is_scored_cautiously(ranks, run_dir, tmp_path):
    members = [str(run_dir / "checkpoints" / name) for name in ("step_00000003", "step_00000006")]
    alone = [
        [row["reward"] for row in score(ranks, run_dir, tmp_path / f"{i}.jsonl", m)] for i, m in enumerate(members)
    ]
    both = score(ranks, run_dir, tmp_path / "both.jsonl", members, deviations=2.0)
    for n, row in enumerate(both):
        a, b = alone[0][n], alone[1][n]
        assert row["rewards"] == [a, b] and a != b
        assert row["reward"] == pytest.approx((a + b) / 2 - 2 * abs(a - b) / 2)


def test_the_mean_minus_standard_deviations():
    rows = [Row("line 1", {"id": 7}, 1.0), Row("line 2", {"id": 8}, 1.0)]
    lines = [json.loads(line) for line in scored(rows, np.array([[1.0, 2.0], [3.0, 2.0], [8.0, 2.0]]), 0.5)]
    std = ((9 + 1 + 16) / 3) ** 0.5
    assert lines[0].pop("rewards") == [1.0, 3.0, 8.0]
    wanted = {"id": 7, "reward": 4 - 0.5 * std, "reward_mean": 4.0, "reward_std": std}
    assert lines[0] == pytest.approx(wanted)
    assert lines[1]["reward"] == 2.0 and lines[1]["id"] == 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 1 has no field prompt and no field response"),
        ({"messages": []}, "line 1 has no messages"),
        ({"prompt": 5, "response": "b"}, "line 1 field 'prompt' is int, not a string or a list of messages"),
        ({"prompt": "a" * 200, "response": "b"}, "more than the 48"),
    ],
)
def test_rows_that_are_no_conversations(ranks, run_dir, tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        score(ranks, run_dir, tmp_path / "scores.jsonl", str(run_dir), input=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": None}, "checkpoint=None is not a run directory"),
        ({"checkpoint": ["a", {"b": 1}]}, r"checkpoint=\{'b': 1\} is not a run directory"),
        ({"output": "/nowhere/scores.jsonl"}, "there is no folder /nowhere"),
        ({"input": "/nowhere/rows.jsonl"}, r"input=/nowhere/rows\.jsonl does not exist; there is no nowhere in /"),
    ],
)
def test_settings_that_cannot_be_served(run_dir, settings, message):
    given = {"checkpoint": "a", "input": str(run_dir.parent / "rows.jsonl"), "output": "scores.jsonl"} | settings
    with pytest.raises(ValueError, match=message):
        main(ScoreConfig(**given))


def test_a_reward_model_is_evaluated_on_its_held_out_prompts_and_writes_no_text(ranks, run_dir):
    from launch import evaluate, generate

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in rows if "val_loss" in row)
    settings = EvaluateConfig(checkpoint=str(run_dir), precision="fp32")
    message = ranks.run(1, printed, "evaluate", settings)[0]
    for line in ("accuracy        {val_reward_accuracy:.3f}", "held-out loss   {val_loss:.4f}\n"):
        assert line.format(**logged) in message
    ignored = replace(settings, record_routing=str(run_dir / "routing"))
    code, message = ranks.run(1, in_rank, evaluate.main, ignored)[0]
    assert code == 2 and "record_routing needs held-out text, and the run has preferences" in message
    code, message = ranks.run(1, in_rank, generate.main, GenerateConfig(checkpoint=str(run_dir), prompt="a"))[0]
    assert code == 2 and "reward model" in message


def test_the_example_file_is_ranked():
    for row in synthetic_preferences.rows(20, 4):
        assert len(set(row["responses"])) == 4
