"""What preparation costs where there is much data, and the weights of a blend by size."""

from pathlib import Path

import numpy as np
import pytest

from conf.schema import BlendPart, Config, DataConfig
from corpus.open_data import held_out_parts
from corpus.prepare import Prepared, prepare
from tests.corpus.helpers import write_pair


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Two of 300 tokens each."""
    return [write_pair(tmp_path / name, [[1, 2, 0]] * 100) for name in "ab"]


def run(tmp_path: Path, **settings) -> Prepared:
    data = DataConfig(cache_dir=str(tmp_path / "cache"), valid_fraction=0.1, **settings)
    return prepare(data, vocab_size=400, sequence_length=8)


@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
def test_the_size_of_a_part_counts_by_temperature(tmp_path, pairs, temperature):
    """The second part has twice the tokens."""
    a, b = pairs
    parts = [BlendPart(weight=3, kind="megatron", files=[a]), BlendPart(kind="megatron", files=[a, b])]
    prepared = run(tmp_path, kind="blend", blend=parts, temperature=temperature)
    second = 1.0 if temperature is None else 2 ** (1 / temperature)
    assert [source.part for source in prepared.train] == [0, 1, 1]
    weights = np.array([source.weight for source in prepared.train])
    assert weights / weights[1] == pytest.approx([3 / second * 2, 1, 1])
    assert weights.sum() == pytest.approx(1)


def test_a_part_of_whose_held_out_text_no_token_can_be_predicted(tmp_path, pairs):
    """It has no held-out loss; that of the other part stays."""
    one = write_pair(tmp_path / "one", [[1, 2, 0]] * 10 + [[5]])
    parts = [BlendPart(name=name, kind="megatron", files=[path]) for name, path in (("a", pairs[0]), ("one", one))]
    config = Config()
    config.data = DataConfig(kind="blend", blend=parts)
    config.eval.by_part, config.train.sequence_length = True, 8
    prepared = run(tmp_path, kind="blend", blend=parts)
    assert [source.num_tokens for source in prepared.valid] == [30, 1]
    assert list(held_out_parts(prepared, config)) == ["a"]


def test_an_index_is_validated_again_only_when_it_changes(tmp_path, pairs, monkeypatch):
    run(tmp_path, kind="megatron", files=pairs)
    read: list[str] = []
    monkeypatch.setattr("corpus.indexed.read_index", lambda prefix: read.append(prefix))
    run(tmp_path, kind="megatron", files=pairs)
    assert not read
    Path(f"{pairs[1]}.idx").touch()
    run(tmp_path, kind="megatron", files=pairs)
    assert read == pairs[1:]
