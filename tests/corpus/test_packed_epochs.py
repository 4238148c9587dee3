"""Best-fit packing for pre-training: every label once an epoch, nothing of a document elsewhere, from any sample on."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import packed_epochs
from corpus.cache import Cache
from corpus.packed_epochs import PackedEpochs
from corpus.prepare import Source
from corpus.stream import TrainStream
from tests.corpus.helpers import prepared_of, write_pair
from tests.corpus.test_epochs import write_index


def opened(prefix: str, lengths: list[int], cache: Path, size: int, *, mask: bool = True) -> PackedEpochs:
    source = Source(prefix, 1.0, 0, len(lengths), sum(lengths))
    return PackedEpochs(source, size, [1, 0], Cache(str(cache)), document_mask=mask)


def distinct(lengths: list[int]) -> list[list[int]]:
    """Every token occurs once, so that it tells where it comes from."""
    ends = np.cumsum([1, *lengths]).tolist()
    return [list(range(start, end)) for start, end in pairwise(ends)]


def parts_of(sample: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each part of a document and their last label."""
    used = int((~sample["padding"]).sum())
    assert not sample["padding"][:used].any() and sample["loss_mask"].tolist() == (~sample["padding"]).float().tolist()
    starts = [i for i in range(used) if sample["positions"][i] == 0]
    parts = []
    for begin, end in pairwise([*starts, used]):
        assert sample["positions"][begin:end].tolist() == list(range(end - begin))
        parts.append([*sample["tokens"][begin:end].tolist(), int(sample["labels"][end - 1])])
        assert sample["labels"][begin : end - 1].tolist() == parts[-1][1:-1]
    return parts


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    size=st.integers(2, 9),
    window=st.integers(1, 8),
    group=st.integers(1, 3),
)
def test_every_label_once_an_epoch(tmp_path_factory, lengths, size, window, group):
    lengths = [*lengths, 2]
    folder, documents = tmp_path_factory.mktemp("packed"), distinct(lengths)
    prefix = write_pair(folder / "pair", documents)
    # Of each document full sequences, then one shorter part; in this order whatever the packing.
    wanted = sorted(
        document[begin : begin + size + 1] for document in documents for begin in range(0, len(document) - 1, size)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_epochs, "_WINDOW", window)
        patch.setattr(packed_epochs, "_GROUP", group)
        read = opened(prefix, lengths, folder / "cache", size)
        at = 0
        for _ in range(2):
            found: list[list[int]] = []
            while len(found) < len(wanted):
                found += parts_of(read.sample(at))
                at += 1
            assert sorted(found) == wanted
        # From any sample on, in another process, with or without the cache.
        for other in (folder / "cache", folder / "none"):
            again = opened(prefix, lengths, other, size)
            for index in (at - 1, at // 2, 0):
                assert all(torch.equal(again.sample(index)[k], v) for k, v in read.sample(index).items())


def test_without_document_mask_positions_go_on(tmp_path):
    lengths = [3, 4, 5]
    prefix = write_pair(tmp_path / "pair", distinct(lengths))
    sample = opened(prefix, lengths, tmp_path / "cache", 16, mask=False).sample(0)
    assert sample["positions"].tolist() == list(range(16)) and int(sample["padding"].sum()) == 16 - 9


def test_shares_of_hand_drawn_documents(tmp_path):
    """4 + 4 places of a document of 9 tokens, 3 + 1 of two others, and 2: three full sequences and one half."""
    lengths = [9, 4, 2, 3]
    documents = distinct(lengths)
    prefix = write_pair(tmp_path / "pair", documents)
    notes: list[str] = []
    prepared = prepared_of({prefix: documents}, [1.0])
    how = {"sequence_length": 4, "seed": 1, "cache_dir": str(tmp_path / "cache"), "document_mask": True}
    TrainStream(prepared, **how, packing_strategy="best_fit", note=notes.append)
    assert notes == [
        "best-fit packing: 4 documents in 4 sequences, 12.50% padding; 25.0% of the documents are longer than a "
        "sequence and cut (concatenated: 62.5%)"
    ]


def test_documents_of_one_token_alone_are_refused(tmp_path):
    prefix = write_pair(tmp_path / "pair", [[1]] * 9)
    with pytest.raises(ValueError, match=r"no document of .*pair\.bin has two tokens"):
        opened(prefix, [1] * 9, tmp_path / "cache", 4).sample(0)


def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch):
    """An array with a number for each document would take 16 MB here."""
    monkeypatch.setattr(packed_epochs, "_WINDOW", 1 << 14)
    lengths = np.arange(2_000_000, dtype=np.int32) % 5
    write_index(tmp_path / "pair", lengths)
    source = Source(f"{tmp_path}/pair", 1.0, 0, len(lengths), int(lengths.sum()), sha256="content")
    tracemalloc.start()
    try:
        read = PackedEpochs(source, 256, [1, 0], Cache(str(tmp_path / "cache")), document_mask=True)
        assert all(len(read.sample(i)["tokens"]) == 256 for i in range(0, 500, 50))
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
