"""Parts of a blend that a run passes through a given number of times."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.blend_plan import blend_plan
from conf.schema import BlendPart, BlendStage, Config, DataConfig
from corpus.blend_epochs import with_quotas
from corpus.open_data import PartShares, blend_row, training_stream
from corpus.prepare import Prepared, prepare
from tests.corpus.helpers import write_pair

SIZE, BATCH = 8, 4
PAIRS = {"held_out": (1, 20), "a": (1000, 40), "b": (2000, 56), "c": (3000, 9)}
"""The first token, which are consecutive numbers, and the documents."""


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Documents of 1 to 20 tokens, in all a multiple of SIZE and one: an epoch leaves nothing out."""
    prefixes = []
    for name, (first, documents) in PAIRS.items():
        lengths = [1 + 7 * i % 20 for i in range(documents)]
        lengths[-1] += (1 - sum(lengths)) % SIZE
        ids = [list(range(begin, end)) for begin, end in pairwise(np.cumsum([first, *lengths]).tolist())]
        prefixes.append(write_pair(tmp_path / name, ids))
    return prefixes


def config_of(tmp_path: Path, held_out: str, parts: list[BlendPart], steps: int, **data: Any) -> Config:
    config = Config()
    kept = {"kind": "blend", "blend": parts, "cache_dir": str(tmp_path / "cache"), "valid_files": [held_out]}
    config.data = replace(DataConfig(), **kept, **data)
    config.train = replace(config.train, steps=steps, global_batch_size=BATCH, sequence_length=SIZE)
    return config


def part(prefix: str, **settings: Any) -> BlendPart:
    return BlendPart(kind="megatron", files=[prefix], **settings)


def prepared_of(config: Config) -> Prepared:
    return with_quotas(prepare(config.data, vocab_size=4000, sequence_length=SIZE), config)


def labels_of(config: Config) -> tuple[Prepared, list[list[int]]]:
    """The labels of each sample of a run, without padding."""
    prepared = prepared_of(config)
    how = {"sequence_length": SIZE, "seed": config.train.seed, "plan": blend_plan(config)}
    stream, found = training_stream(prepared, config.data, **how), []
    for index in range(config.train.steps * BATCH):
        sample = stream.sample(index)
        counted = sample["loss_mask"].bool() if "loss_mask" in sample else slice(None)
        found.append(sample["labels"][counted].tolist())
    return prepared, found


def is_of_a(labels: list[int]) -> bool:
    return 1000 <= labels[0] < 2000


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_document_is_seen_as_often_as_asked(tmp_path: Path, pairs: list[str], packing: str) -> None:
    held_out, a, b, _ = pairs
    config = config_of(tmp_path, held_out, [part(a, epochs=2), part(b, name="rest")], 80, packing_strategy=packing)
    prepared, samples = labels_of(config)
    source = prepared.train[0]
    seen = Counter(label for sample in samples if is_of_a(sample) for label in sample)
    # Every token is a label but the first: of an epoch, or of each document where these are packed.
    firsts = source.num_documents if packing == "best_fit" else 1
    assert sum(seen.values()) == 2 * (source.num_tokens - firsts)
    assert Counter(seen.values())[2] >= source.num_tokens - 2 * firsts
    of_a = [is_of_a(sample) for sample in samples]
    assert all(abs(sum(of_a[:end]) - sum(of_a) * end / 320) <= 1 for end in range(0, 321, BATCH)), "evenly over the run"
    assert blend_row(prepared, config)[0][2].startswith("epochs in 80 steps: 0_megatron 2 as set, rest ")
    shares = PartShares(prepared, config).between(0, 320)
    assert shares["0_megatron"] == sum(of_a) / 320 and sum(shares.values()) == 1


def test_a_fraction_and_a_stage_that_takes_all(tmp_path: Path, pairs: list[str]) -> None:
    held_out, a, b, c = pairs
    parts = [part(a, epochs=1.5, weight=0), part(b), part(c)]
    stages = [BlendStage(step=41, weights=[1, 1, 3])]
    prepared, samples = labels_of(config_of(tmp_path, held_out, parts, 80, stages=stages))
    assert not any(map(is_of_a, samples[:160]))
    seen = Counter(label for sample in samples if is_of_a(sample) for label in sample)
    assert sum(seen.values()) == round(1.5 * (prepared.train[0].num_tokens - 1) / SIZE) * SIZE
    assert min(seen.values()) >= 1 and max(seen.values()) == 2 and len(seen) >= prepared.train[0].num_tokens - 1
    others = [sample for sample in samples[160:] if not is_of_a(sample)]
    assert abs(sum(sample[0] >= 3000 for sample in others) - 0.75 * len(others)) < 4, "the others by their weights"


def test_of_several_files_each_is_seen_as_often(tmp_path: Path, pairs: list[str]) -> None:
    """Where all parts have epochs, the run has the steps that they take, and the last one is filled up."""
    held_out, a, b, _ = pairs
    parts = [BlendPart(kind="megatron", files=[a, b], epochs=2)]
    with pytest.raises(ValueError, match=r"take 250 sequences, but train.steps=62 has 248; nearest: train.steps=63$"):
        prepared_of(config_of(tmp_path, held_out, parts, 62))
    with pytest.raises(ValueError, match=r"train.steps=64 has 256 .* end after 250; nearest: train.steps=63, or a we"):
        prepared_of(config_of(tmp_path, held_out, parts, 64))
    prepared, samples = labels_of(config_of(tmp_path, held_out, parts, 63))
    wanted = [2 * (source.num_tokens - 1) // SIZE for source in prepared.train]
    found = [sum(map(is_of_a, samples)), sum(sample[0] >= 2000 for sample in samples)]
    assert sum(wanted) == 250 and sum(found) == 252
    assert all(0 <= many - few <= 2 for many, few in zip(found, wanted, strict=True))


def test_what_a_stage_cannot_hold_is_an_error(tmp_path: Path, pairs: list[str]) -> None:
    held_out, a, b, _ = pairs
    parts, stages = [part(a, epochs=4, weight=0), part(b)], [BlendStage(step=71, weights=[1, 1])]
    with pytest.raises(ValueError, match=r"the stage from step 71 has 40; nearest: 0\.\d+ times these epochs, a"):
        prepared_of(config_of(tmp_path, held_out, parts, 80, stages=stages))
    with pytest.raises(ValueError, match=r"0\.001 epochs of 0_megatron are less than one sequence; nearest: "):
        prepared_of(config_of(tmp_path, held_out, [part(a, epochs=0.001), part(b)], 80))
