"""The order of an epoch, its index, and what a rank holds of it."""

import threading
import tracemalloc
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import epochs
from corpus.cache import Cache
from corpus.epochs import Epochs
from corpus.pair_writer import HEADER, MAGIC
from corpus.permutation import Permutation
from corpus.prepare import Source
from tests.corpus.helpers import write_pair


def open_epochs(prefix: str, lengths: list[int], folder: Path, *, size: int, ahead: bool = False) -> Epochs:
    source = Source(prefix, 1.0, 0, len(lengths), sum(lengths))
    return Epochs(source, size, [1, 0], Cache(str(folder)), ahead=ahead)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=15), size=st.integers(1, 9), chunk=st.integers(1, 6))
def test_samples_are_cut_from_the_shuffled_documents(tmp_path_factory, lengths, size, chunk):
    """Against lists: shuffle the documents, put them together, cut, shuffle the samples."""
    lengths = [*lengths, size + 1]
    folder = tmp_path_factory.mktemp("epochs")
    ends = np.cumsum([1, *lengths]).tolist()
    documents = [list(range(start, end)) for start, end in pairwise(ends)]
    prefix = write_pair(folder / "pair", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epochs, "_CHUNK", chunk)
        patch.setattr(epochs, "_SAMPLES", chunk)
        read = open_epochs(prefix, lengths, folder / "cache", size=size)
        count = (sum(lengths) - 1) // size
        for epoch in range(2):
            order = Permutation(len(lengths), [1, 0, epoch, 0]).images(0, len(lengths))
            text = list(chain(*(documents[i] for i in order)))
            samples = [text[i * size : i * size + size + 1] for i in range(count)]
            shuffled = Permutation(count, [1, 0, epoch, 1]).images(0, count)
            expected = [samples[i] for i in shuffled]
            assert [read.sample(epoch * count + i).tolist() for i in range(count)] == expected


def test_the_order_that_runs_were_promised(tmp_path):
    """Written down when this order was introduced: a change of it needs a new version, and the old one kept."""
    documents = [[10 * i + j for j in range(length)] for i, length in enumerate([5, 30, 1, 17, 9, 22, 40, 3])]
    read = open_epochs(write_pair(tmp_path / "pair", documents), [*map(len, documents)], tmp_path, size=8)
    assert [int(read.sample(i)[0]) for i in range(20)] == PROMISED


PROMISED = [30, 97, 17, 25, 42, 89, 38, 71, 55, 73, 71, 63, 46, 65, 81, 90, 71, 10, 26, 36]


def write_index(prefix: Path, lengths: np.ndarray) -> None:
    """A pair of many documents whose tokens are all zero and take no space."""
    count = len(lengths)
    begins = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * 2])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        lengths.astype(np.int32).tofile(file)
        begins[:-1].tofile(file)
        np.arange(count + 1, dtype=np.int64).tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(int(begins[-1]))


def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch):
    """Neither where an index is built nor where it is used: an array with a number for each document would take 16
    MB here."""
    monkeypatch.setattr(epochs, "_CHUNK", 1 << 14)
    lengths = np.arange(2_000_000, dtype=np.int32) % 5
    write_index(tmp_path / "pair", lengths)
    source = Source(f"{tmp_path}/pair", 1.0, 0, len(lengths), int(lengths.sum()), sha256="content")
    for _ in ("built", "mapped"):
        tracemalloc.start()
        try:
            read = Epochs(source, 256, [1, 0], Cache(str(tmp_path / "cache")), ahead=False)
            assert all(len(read.sample(i)) == 257 for i in range(100))
            assert tracemalloc.get_traced_memory()[1] < 4e6
        finally:
            tracemalloc.stop()


def test_the_next_epoch_is_indexed_before_it_begins(tmp_path, monkeypatch):
    """By the process that is told to, once half of an epoch has passed; a step then only maps the file."""
    lengths = [50] * 8
    prefix = write_pair(tmp_path / "pair", [[1] * n for n in lengths])
    built: list[tuple[int, str]] = []
    starts = Epochs._starts
    monkeypatch.setattr(
        Epochs,
        "_starts",
        lambda self, order: built.append((len(built), threading.current_thread().name)) or starts(self, order),
    )
    read = open_epochs(prefix, lengths, tmp_path / "cache", size=10, ahead=True)
    per_epoch = (sum(lengths) - 1) // 10
    here = threading.current_thread().name

    def finish() -> None:
        for thread in threading.enumerate():
            if thread.name == "index":
                thread.join(60)

    for index in range(3 * per_epoch):
        read.sample(index)
        finish()
        expected = 1 + (2 * (index % per_epoch) >= per_epoch) + index // per_epoch
        assert built == [(0, here), *((n, "index") for n in range(1, expected))], index
    other = open_epochs(prefix, lengths, tmp_path / "cache", size=10)
    assert all(np.array_equal(other.sample(i), read.sample(i)) for i in (0, per_epoch, 2 * per_epoch + 3))
    assert len(built) == 4


def test_a_failure_to_index_ahead_is_met_where_the_epoch_begins(tmp_path, monkeypatch):
    lengths = [50] * 8
    read = open_epochs(
        write_pair(tmp_path / "pair", [[1] * n for n in lengths]), lengths, tmp_path / "cache", size=10, ahead=True
    )
    read.sample(0)

    def fail(self: Epochs, order: Permutation) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Epochs, "_starts", fail)
    read.sample(38)
    with pytest.raises(OSError, match="no space left"):
        read.sample(39)


def test_sources_of_equal_lengths_and_other_content_have_indices_of_their_own(tmp_path):
    lengths = [30] * 4
    prefix = write_pair(tmp_path / "pair", [[1] * n for n in lengths])
    source = Source(prefix, 1.0, 0, 4, 120, sha256="one")
    for content in (source, source, replace(source, sha256="another")):
        Epochs(content, 10, [1, 0], Cache(str(tmp_path / "cache")), ahead=False).sample(0)
    assert len([*(tmp_path / "cache" / "samples").glob("*/starts.npy")]) == 2
