"""Runs on conversations, from the weights of a run on text."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import BlendPart, CheckpointConfig, Config, DataConfig, EvalConfig
from corpus.chat_template import DEFAULT_TEMPLATE
from corpus.example_chat import conversations
from corpus.tokenizer_files import COMPANION_DIR
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, trajectory, with_layout, write_corpus
from tests.training.test_initial_weights import run

LIMIT = 300.0


@pytest.fixture(scope="module")
def base(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    config = tiny_config(corpus, tmp_path_factory.mktemp("base") / "run", steps=4)
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    return Path(config.run.dir)


def chat_config(folder: Path, base: Path, run_dir: Path, **train: Any) -> Config:
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(80)))
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ m.role ~ ': ' }}{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}"
        "{% endfor %}"
    )
    config = tiny_config(folder / "chats.jsonl", run_dir, **{"steps": 6, "sequence_length": 128, **train})
    data = DataConfig(kind="chat", files=[str(folder / "chats.jsonl")], cache_dir=str(folder / "cache"))
    config.data = replace(data, document_mask=True, valid_fraction=0.1)
    config.eval = EvalConfig(every=3, sample_tokens=0)
    config.checkpoint = CheckpointConfig(every=0, load=str(base))
    return config


def test_a_run_on_conversations_starts_from_weights_and_continues(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    config = chat_config(tmp_path, base, tmp_path / "run")
    assert ranks.run(1, run, config, timeout=LIMIT) == [0]
    first = rows(tmp_path / "run")[0]
    assert first["step"] == 1 and first["lr"] == pytest.approx(config.optim.lr / config.optim.warmup_steps)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "run" / COMPANION_DIR / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    held_out = [row["val_loss"] for row in map(json.loads, lines) if "val_loss" in row]
    assert held_out[-1] < held_out[0]
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"weights from {base}" in log and "[[User:" in log
    assert re.search(r"\d+ conversations in \d+ sequences of 128 tokens: \d+\.\d% padding", log)
    # Stopped and continued, on two ranks: the same.
    other = chat_config(tmp_path, base, tmp_path / "other")
    assert ranks.run(1, run, replace(other, train=replace(other.train, stop_after=3)), timeout=LIMIT) == [0]
    kept = tmp_path / "other" / COMPANION_DIR / "chat_template.jinja"
    kept.unlink()  # as of a version that did not keep the default template
    assert ranks.run(1, run, other, timeout=LIMIT) == [0]
    assert kept.read_text() == DEFAULT_TEMPLATE
    assert trajectory(tmp_path / "other") == trajectory(tmp_path / "run")
    two = with_layout(chat_config(tmp_path, base, tmp_path / "two"), ep=2)
    assert ranks.run(2, run, two, timeout=LIMIT) == [0, 0]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("two", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def blended(config: Config, corpus: Path) -> Config:
    """With text beside the conversations."""
    parts = [BlendPart(files=[str(corpus)], name="text"), BlendPart(kind="chat", files=config.data.files, name="chat")]
    config.data = replace(config.data, kind="blend", files=[], blend=parts)
    config.eval.by_part = True
    return config


def test_a_blend_with_conversations_continues_and_is_the_same_under_layouts(
    ranks: RankPool, base: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path)

    def config(name: str, **train: Any) -> Config:
        return blended(chat_config(tmp_path, base, tmp_path / name, **train), corpus)

    assert ranks.run(1, run, config("whole"), timeout=LIMIT) == [0]
    for stop_after in (3, None):
        assert ranks.run(1, run, config("run", stop_after=stop_after), timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    assert ranks.run(2, run, with_layout(config("two"), ep=2), timeout=LIMIT) == [0, 0]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("two", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    evaluated = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open() if "val_loss/chat" in line][-1]
    parts = evaluated["val_loss/chat"], evaluated["val_loss/text"]
    assert min(parts) < evaluated["val_loss"] < max(parts)
    log = (tmp_path / "whole" / "train.log").read_text()
    assert "[[User:" in log and re.search(r"chat: \d+ conversations in \d+ sequences", log)


def test_the_run_keeps_a_template_of_its_own(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    config = chat_config(tmp_path, base, tmp_path / "run", steps=1)
    config.data.chat_template = str(tmp_path / "template.jinja")
    config.eval = EvalConfig(every=0, sample_tokens=0, final_batches=1)
    assert ranks.run(1, run, config, timeout=LIMIT) == [0]
    kept = tmp_path / "run" / COMPANION_DIR / "chat_template.jinja"
    assert kept.read_text() == (tmp_path / "template.jinja").read_text()
    assert "[[user: ]]" in (tmp_path / "run" / "train.log").read_text()
