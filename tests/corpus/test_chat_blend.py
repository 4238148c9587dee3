"""Conversations as a part of a blend."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.blend_plan import blend_plan
from conf.schema import BlendPart, BlendStage, Config
from corpus.blend_epochs import with_quotas
from corpus.chat_stream import ChatStream, ChatWindows
from corpus.example_chat import conversations
from corpus.open_data import PartShares, blend_row, example_chat, held_out_parts, held_out_samples, training_stream
from corpus.prepare import Prepared, prepare
from corpus.stream import Stream, TrainStream, ValidWindows
from tests.corpus.test_chat_stream import SIZE, VOCABULARY, write_rows


def config_of(folder: Path, *, steps: int = 40, **data: Any) -> Config:
    chats = write_rows(folder / "chats.jsonl", conversations(60))
    texts = write_rows(folder / "texts.jsonl", [{"text": f"{n} is followed by {n + 1}. " * 9} for n in range(200)])
    parts = [BlendPart(3, files=[str(texts)], name="text"), BlendPart(1, kind="chat", files=[str(chats)], name="chat")]
    config = Config()
    kept = {"kind": "blend", "blend": parts, "cache_dir": str(folder / "cache"), "document_mask": True}
    config.data = replace(config.data, **{**kept, "valid_fraction": 0.2, **data})
    config.train = replace(config.train, steps=steps, global_batch_size=8, sequence_length=SIZE, seed=5)
    config.eval.by_part = True
    return config


def opened(config: Config) -> tuple[Prepared, Stream]:
    prepared = with_quotas(prepare(config.data, vocab_size=VOCABULARY, sequence_length=SIZE), config)
    how = {"sequence_length": SIZE, "seed": config.train.seed, "plan": blend_plan(config)}
    return prepared, training_stream(prepared, config.data, **how)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in ("tokens", "labels", "positions", "loss_mask"))


@pytest.mark.parametrize("packing_strategy", ["concatenate", "best_fit"])
def test_samples_are_those_of_each_part_alone(tmp_path: Path, packing_strategy: str) -> None:
    """By shares and in order, and whether what was read before them was read or not."""
    config = config_of(tmp_path, packing_strategy=packing_strategy)
    prepared, stream = opened(config)
    alone = replace(prepared, train=prepared.train[:1])
    texts: Stream = TrainStream(
        alone,
        sequence_length=SIZE,
        seed=5,
        cache_dir=config.data.cache_dir,
        document_mask=True,
        packing_strategy=packing_strategy,
    )
    chats = ChatStream(prepared.train[1], config.data, sequence_length=SIZE, seed=[5, 1])
    seen = [0, 0]
    for index in range(200):  # more than two epochs of the conversations
        sample = stream.sample(index)
        assert set(sample) == {"tokens", "labels", "positions", "loss_mask", "padding"}
        expected = [texts.sample(seen[0]), chats.sample(seen[1])]
        expected[0].setdefault("loss_mask", torch.ones(SIZE))
        (source,) = [number for number in (0, 1) if equal(sample, expected[number])]
        assert torch.equal(sample["padding"], expected[source].get("padding", torch.zeros(SIZE, dtype=torch.bool)))
        seen[source] += 1
    assert abs(seen[1] - 50) <= 1 and seen == [
        round(200 * x) for x in PartShares(prepared, config).between(0, 200).values()
    ]
    assert equal(opened(config)[1].sample(199), sample), "as a run that resumes there"
    assert example_chat(stream) is not None and example_chat(texts) is None


def test_epochs_and_stages_of_conversations(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.data.blend[1] = replace(config.data.blend[1], epochs=2.0, weight=0)
    config.data.stages = [BlendStage(step=21, weights=[1, 1])]
    prepared, stream = opened(config)
    of_chat = [index for index in range(320) if not stream.sample(index)["loss_mask"].all()]
    alone = ChatStream(prepared.train[1], config.data, sequence_length=SIZE, seed=[5, 1])
    two_epochs = len(alone._packs(0)) + len(alone._packs(1))
    assert of_chat[0] >= 160 and len(of_chat) == two_epochs
    assert all(equal(stream.sample(index), alone.sample(n)) for n, index in enumerate(of_chat))
    assert blend_row(prepared, config)[0][2].endswith("chat 2 as set")
    by_weight = config_of(tmp_path)
    prepared, _ = opened(by_weight)
    taken = 320 * PartShares(prepared, by_weight).between(0, 320)["chat"]
    shown = blend_row(prepared, by_weight)[0][2].rpartition(" ")[2]
    assert float(shown) == pytest.approx(taken / len(alone._packs(0)), abs=0.005), "sequences, however full they are"


def test_held_out_samples_are_those_of_all_parts(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prepared, _ = opened(config)
    windows = held_out_samples(prepared, config.data, sequence_length=SIZE)
    texts = ValidWindows(replace(prepared, valid=prepared.valid[:1]), sequence_length=SIZE, document_mask=True)
    chats = ChatWindows(prepared.valid[1], config.data, sequence_length=SIZE)
    expected = [*map(texts.sample, range(len(texts))), *map(chats.sample, range(len(chats)))]
    assert len(windows) == len(expected) and min(len(texts), len(chats)) > 1
    assert all(equal(windows.sample(index), sample) for index, sample in enumerate(expected))
    assert windows.sample(len(windows))["padding"].all()
    parts = held_out_parts(prepared, config)
    assert {name: len(part) for name, part in parts.items()} == {"text": len(texts), "chat": len(chats)}
    # Files of their own are text: conversations are then not held out.
    other = write_rows(tmp_path / "held_out.jsonl", [{"text": "words and words " * 60}])
    config = config_of(tmp_path, valid_files=[str(other)])
    prepared, _ = opened(config)
    assert isinstance(held_out_samples(prepared, config.data, sequence_length=SIZE), ValidWindows)
