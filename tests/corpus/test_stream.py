import collections
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from corpus.prepare import Source
from corpus.stream import BatchShard, TrainStream, ValidWindows, positions_within
from tests.corpus.helpers import prepared_of, write_pair

# Every token of a document occurs once in the whole corpus, so that a token in a sample tells where it came from.
document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def distinct_documents(lengths: list[int], first: int = 1) -> list[list[int]]:
    ends = np.cumsum([first, *lengths]).tolist()
    return [list(range(start, end)) for start, end in pairwise(ends)]


def new_stream(prepared, cache: Path, *, sequence_length=8, seed=1, document_mask=False, **options) -> TrainStream:
    options |= {"sequence_length": sequence_length, "seed": seed, "document_mask": document_mask}
    return TrainStream(prepared, cache_dir=str(cache), **options)


@pytest.fixture
def single(tmp_path: Path):
    documents = distinct_documents([5, 30, 1, 17, 9, 22, 40, 3])
    return prepared_of({write_pair(tmp_path / "pair", documents): documents}, [1.0])


@settings(max_examples=40, deadline=None)
@given(lengths=document_lengths, sequence_length=st.integers(2, 16), seed=st.integers(0, 5))
def test_every_epoch_holds_every_token_once(tmp_path_factory, lengths, sequence_length, seed):
    """Labels of an epoch: all tokens in some order of the documents, except the first one and the last partial
    sample. The order is put together from the samples alone."""
    total = sum(lengths)
    if total <= sequence_length:
        lengths = [*lengths, sequence_length]
        total += sequence_length
    folder = tmp_path_factory.mktemp("stream")
    documents = distinct_documents(lengths)
    stream = new_stream(
        prepared_of({write_pair(folder / "pair", documents): documents}, [1.0]),
        folder / "cache",
        sequence_length=sequence_length,
        seed=seed,
    )
    per_epoch = (total - 1) // sequence_length
    after = {token: following for document in documents for token, following in pairwise(document)}
    for epoch in range(3):
        samples = [stream.sample(epoch * per_epoch + i) for i in range(per_epoch)]
        labels = collections.Counter(label for sample in samples for label in sample["labels"].tolist())
        inputs = collections.Counter(token for sample in samples for token in sample["tokens"].tolist())
        assert set(labels.values()) == set(inputs.values()) == {1}
        assert len(labels) == per_epoch * sequence_length  # with `total` tokens, so less than a sample is missing
        for sample in samples:
            for token, label in zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True):
                assert after.get(token, label) == label  # within a document, the token that follows
                if token not in after:
                    assert label in {document[0] for document in documents}  # after a document, another one begins


def test_epochs_are_shuffled_differently(single, tmp_path):
    stream = new_stream(single, tmp_path / "cache")
    per_epoch = (127 - 1) // 8
    epochs = [[stream.sample(e * per_epoch + i)["tokens"].tolist() for i in range(per_epoch)] for e in range(2)]
    assert epochs[0] != epochs[1]
    other_seed = new_stream(single, tmp_path / "cache", seed=2)
    assert [other_seed.sample(i)["tokens"].tolist() for i in range(per_epoch)] != epochs[0]


def test_samples_do_not_depend_on_what_was_read_before(single, tmp_path):
    order = [40, 3, 16, 0, 15, 99, 14]
    read_in_order = new_stream(single, tmp_path / "one")
    expected = [read_in_order.sample(i)["labels"] for i in range(100)]
    elsewhere = new_stream(single, tmp_path / "two")
    for i in order:
        assert torch.equal(elsewhere.sample(i)["labels"], expected[i])


def test_epochs_in_a_cache_that_cannot_be_written_to(single, tmp_path, monkeypatch):
    writer = new_stream(single, tmp_path / "cache")
    expected = [writer.sample(i)["labels"] for i in range(5)]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("corpus.cache.Cache._locked", lambda self, path: pytest.fail("a lock is written to"))
    for folder in ("cache", "empty"):  # warm, and by an index in memory
        reader = new_stream(single, tmp_path / folder)
        assert all(torch.equal(reader.sample(i)["labels"], expected[i]) for i in range(5))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_damaged_epoch_is_indexed_again(single, tmp_path):
    writer = new_stream(single, tmp_path / "cache")
    expected = [writer.sample(i)["labels"] for i in range(15)]
    (index,) = (tmp_path / "cache" / "samples").glob("*/starts.npy")
    with open(index, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")  # past the end of the data
    notes: list[str] = []
    reader = new_stream(single, tmp_path / "cache", note=notes.append)
    assert all(torch.equal(reader.sample(i)["labels"], expected[i]) for i in range(15))
    assert len(notes) == 1 and "starts.npy has different content than was written" in notes[0]


RANK = """
import json, sys, time, torch.distributed as dist
from pathlib import Path
from corpus.prepare import Prepared
from corpus.prepare import Source
from corpus.stream import TrainStream
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
prepared = Prepared.from_json((folder / "prepared.json").read_text())
stream = TrainStream(prepared, sequence_length=8, seed=1, cache_dir=str(folder / "ranks"), document_mask=False)
if rank == 0:  # no rank may depend on the first one to have built the index
    while not (folder / "rank1.json").exists():
        time.sleep(0.02)
labels = [stream.sample(i)["labels"].tolist() for i in range(40)]
(folder / f"rank{rank}.json").write_text(json.dumps(labels))
"""


def test_all_ranks_see_the_same_samples(single, tmp_path):
    (tmp_path / "prepared.json").write_text(single.to_json())
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    stream = new_stream(single, tmp_path / "here")
    here = [stream.sample(i)["labels"].tolist() for i in range(40)]
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)] == [here, here]


def test_only_the_range_of_documents_is_read(tmp_path):
    documents = distinct_documents([20, 20, 20, 20])
    whole = prepared_of({write_pair(tmp_path / "pair", documents): documents}, [1.0])
    source = replace(whole.train[0], first_document=1, num_documents=2, num_tokens=40)
    part = replace(whole, train=[source], valid=[source])
    train = new_stream(part, tmp_path / "cache", sequence_length=13)  # 40 = 3 * 13 + 1: nothing is left out
    read = [train.sample(i) for i in range(3)]
    assert {t for s in read for t in [*s["tokens"].tolist(), *s["labels"].tolist()]} == set(documents[1] + documents[2])
    valid = ValidWindows(part, sequence_length=13, document_mask=False)
    assert [t for i in range(len(valid)) for t in valid.sample(i)["labels"].tolist()] == (documents[1] + documents[2])[
        1:
    ]


def test_documents_of_several_sequences_and_empty_ones(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/pair.bin", dtype=np.uint16)
    for ids, lengths in (([1, 2, 3, 4, 5], [2, 3]), ([], [0]), ([6, 7, 8, 9], [4]), ([10, 11], [1, 1])):
        builder.add_document(ids, lengths)
    builder.finalize(f"{tmp_path}/pair.idx")
    source = Source(f"{tmp_path}/pair", 1.0, first_document=0, num_documents=3, num_tokens=9)
    part = replace(prepared_of({}, []), train=[source], valid=[source])
    train = new_stream(part, tmp_path / "cache", sequence_length=2)
    inputs = sorted(t for i in range(4) for t in train.sample(i)["tokens"].tolist())
    assert len(set(inputs)) == 8 and set(inputs) < set(range(1, 10))
    valid = ValidWindows(part, sequence_length=4, document_mask=False)
    assert [valid.sample(i)["labels"].tolist() for i in range(len(valid))] == [[2, 3, 4, 5], [6, 7, 8, 9]]


def test_blended_sources_each_go_through_their_epochs(tmp_path):
    documents = [distinct_documents([30, 11]), distinct_documents([9, 50], first=1000)]
    prefixes = {write_pair(tmp_path / f"pair{i}", documents[i]): documents[i] for i in range(2)}
    stream = new_stream(prepared_of(prefixes, [0.25, 0.75]), tmp_path / "cache")
    samples = [stream.sample(i)["tokens"].tolist() for i in range(80)]
    first = [sample for sample in samples if max(sample) < 1000]
    assert abs(len(first) - 20) <= 1
    for epoch in range(3):  # 41 tokens are 5 samples
        inputs = collections.Counter(t for sample in first[epoch * 5 : epoch * 5 + 5] for t in sample)
        assert len(inputs) == 40 and set(inputs.values()) == {1}


@pytest.mark.parametrize("held_out", [False, True])
def test_a_file_that_is_truncated_in_use_is_named(tmp_path, held_out):
    """Reading a page past its end would end the process: SIGBUS."""
    documents = distinct_documents([4000, 4000])
    prepared = prepared_of({write_pair(tmp_path / "data", documents): documents}, [1.0])
    if held_out:
        stream = ValidWindows(prepared, sequence_length=8, document_mask=False)
    else:
        stream = new_stream(prepared, tmp_path / "cache")
    first = stream.sample(990)["tokens"].tolist()
    with (tmp_path / "data.bin").open("r+b") as file:
        whole = file.read()
        file.truncate(0)
    with pytest.raises(OSError, match=r"data\.bin was truncated while it was in use: 0 bytes instead of"):
        stream.sample(990)
    (tmp_path / "data.bin").write_bytes(whole)
    assert stream.sample(990)["tokens"].tolist() == first


def test_positions_start_again_after_an_end_of_document():
    tokens = torch.tensor([7, 7, 0, 5, 0, 0, 6, 6])
    assert positions_within(tokens, eod_id=0).tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert positions_within(tokens, eod_id=None).tolist() == list(range(8))


def test_document_mask_reaches_the_samples(tmp_path):
    documents = [[5, 6, 0], [7, 0], [8, 9, 9, 0]]
    prepared = prepared_of({write_pair(tmp_path / "pair", documents): documents}, [1.0])
    valid = ValidWindows(prepared, sequence_length=8, document_mask=True)
    assert valid.sample(0)["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    train = new_stream(prepared, tmp_path / "cache", document_mask=True).sample(0)
    for before, position, following in zip(
        train["tokens"][:-1].tolist(), train["positions"][:-1].tolist(), train["positions"][1:].tolist(), strict=True
    ):
        assert following == (0 if before == 0 else position + 1)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(document_lengths, min_size=1, max_size=3), sequence_length=st.integers(1, 16))
def test_held_out_windows_predict_each_token_but_the_first_once(tmp_path_factory, lengths, sequence_length):
    folder = tmp_path_factory.mktemp("valid")
    pairs = {}
    for number, of_source in enumerate(lengths):
        documents = distinct_documents([*of_source, 1], first=1 + 1000 * number)
        pairs[write_pair(folder / str(number), documents)] = documents
    windows = ValidWindows(prepared_of(pairs, [1.0] * len(pairs)), sequence_length=sequence_length, document_mask=False)
    predicted = []
    for index in range(len(windows)):
        window = windows.sample(index)
        assert window["loss_mask"].any()
        # Every token has a label, except the last one of a source, after which there is nothing.
        unlabelled = (~window["padding"]).sum() - window["loss_mask"].sum()
        assert unlabelled in (0, 1)
        for token, label, mask in zip(*(window[k].tolist() for k in ("tokens", "labels", "loss_mask")), strict=True):
            assert mask == 0 or label == token + 1  # tokens are consecutive numbers
            predicted += [label] if mask else []
    assert predicted == [token for documents in pairs.values() for token in list(chain(*documents))[1:]]
    past = windows.sample(len(windows))
    assert not past["loss_mask"].any() and past["padding"].all()


class Numbers:
    def sample(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([index, -index])}


def test_micro_batches_deal_out_the_samples_of_a_step():
    # Global batch of 12 from sample 24: two ranks, three micro-batches each, two samples per micro-batch.
    shards = [
        BatchShard(first_sample=24, micro_batch_size=2, num_micro_batches=3, dp_rank=rank, dp_size=2)
        for rank in range(2)
    ]
    batches = [[batch["tokens"][:, 0].tolist() for batch in shard.micro_batches(Numbers())] for shard in shards]
    assert batches == [[[24, 25], [28, 29], [32, 33]], [[26, 27], [30, 31], [34, 35]]]
