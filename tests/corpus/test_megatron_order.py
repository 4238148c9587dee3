"""The order of samples that earlier versions promised."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.megatron_order import GreedyBlend
from corpus.stream import TrainStream
from parallel.checkpoint_manifest import DATA_ORDER
from tests.corpus.helpers import prepared_of, write_pair

WRITTEN = json.loads(Path(__file__).with_name("megatron_order.json").read_text())
"""First tokens of the samples of `sources`, written by the version before DATA_ORDER 2."""


def sources(folder: Path) -> dict[str, list[list[int]]]:
    """Documents in which each token tells where it is from."""
    lengths = {"one": [5, 30, 1, 17, 9, 22, 40, 3], "other": [11, 50, 2, 8, 64, 31]}
    pairs = {}
    for number, (name, of_source) in enumerate(lengths.items()):
        documents, token = [], 1 + 1000 * number
        for length in of_source:
            documents.append(list(range(token, token + length)))
            token += length
        pairs[write_pair(folder / name, documents)] = documents
    return pairs


@pytest.mark.parametrize("name", WRITTEN)
def test_samples_are_those_of_the_version_that_began_the_run(name: str, tmp_path: Path) -> None:
    pairs = sources(tmp_path)
    prepared = prepared_of(pairs, [0.3, 0.7])
    if name == "alone":
        prepared = replace(prepared, train=[replace(prepared.train[0], weight=1.0)])
    if name == "part":
        part = replace(prepared.train[1], first_document=1, num_documents=4, num_tokens=124, weight=1.0)
        prepared = replace(prepared, train=[part])
    stream = TrainStream(prepared, sequence_length=8, seed=5, cache_dir=str(tmp_path / "cache"), document_mask=False)
    new = [int(stream.sample(i)["tokens"][0]) for i in range(len(WRITTEN[name]))]
    stream.keep_order(1)
    assert [int(stream.sample(i)["tokens"][0]) for i in range(len(WRITTEN[name]))] == WRITTEN[name] != new


def test_an_order_of_the_future_is_refused(tmp_path: Path) -> None:
    prepared = prepared_of(sources(tmp_path), [0.3, 0.7])
    stream = TrainStream(prepared, sequence_length=8, seed=5, cache_dir=str(tmp_path / "cache"), document_mask=False)
    with pytest.raises(ValueError, match=f"order {DATA_ORDER + 1}; this version of Switchyard knows {DATA_ORDER}"):
        stream.keep_order(DATA_ORDER + 1)


weights = st.lists(st.integers(1, 20), min_size=2, max_size=4).map(lambda w: [x / sum(w) for x in w])


@settings(max_examples=60, deadline=None)
@given(weights=weights)
def test_blend_keeps_to_its_weights_and_numbers_samples_in_order(weights):
    blend = GreedyBlend(weights)
    counts = [0] * len(weights)
    for index in range(400):
        source, of_source = blend.locate(index)
        assert of_source == counts[source]
        counts[source] += 1
        # A source is chosen only while it is not ahead, so it gets at most one sample ahead, and hence is behind by
        # at most one for each of the others: within one sample for two sources.
        for count, weight in zip(counts, weights, strict=True):
            assert -(len(weights) - 1) - 1e-9 <= count - weight * (index + 1) <= 1 + 1e-9


def test_a_longer_blend_begins_like_a_shorter_one(monkeypatch):
    monkeypatch.setattr("corpus.megatron_order._BLEND_BLOCK", 16)
    grown, long = GreedyBlend([0.5, 0.2, 0.3]), GreedyBlend([0.5, 0.2, 0.3])
    long._grow(5000)
    for index in range(4000):
        assert grown.locate(index) == long.locate(index)
