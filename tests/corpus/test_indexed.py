import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from corpus import indexed
from corpus.indexed import extreme_ids, read_index
from tests.corpus.helpers import token_range, write_pair


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=8),
    chunk=st.integers(1, 10),
    data=st.data(),
)
def test_ranges_and_extremes(tmp_path_factory, documents, chunk, data):
    prefix = write_pair(tmp_path_factory.mktemp("pair") / "p", documents, dtype=np.int32)
    first = data.draw(st.integers(0, len(documents)))
    count = data.draw(st.integers(0, len(documents) - first))
    expected = [i for document in documents[first : first + count] for i in document]
    assert token_range(prefix, first, count).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_SCAN_SEQUENCES", chunk)
        assert read_index(prefix).num_tokens(first, count) == len(expected)
    everything = [i for document in documents for i in document]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_SCAN_TOKENS", chunk)
        assert extreme_ids(prefix) == (min(everything), max(everything))


def test_pairs_that_cannot_be_used(tmp_path):
    def pair(name: str) -> str:
        return write_pair(tmp_path / name, [[1, 2, 3], [4, 5], [6]])

    def refuse(prefix: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_index(prefix)

    good = pair("good")
    refuse(f"{tmp_path}/god", r"god\.bin does not exist; did you mean .*good\.bin\?")
    refuse(f"{good}.bin", rf"give the prefix only: {good}$")

    content = (tmp_path / "good.bin").read_bytes()
    truncated = pair("truncated")
    (tmp_path / "truncated.bin").write_bytes(content[:-4])
    refuse(truncated, r"truncated\.bin has 8 bytes, but .*\.idx describes 12: the \.bin is truncated")

    foreign = pair("foreign")
    (tmp_path / "foreign.bin").write_bytes(content * 2)
    refuse(foreign, r"foreign\.bin has 24 bytes, but .*\.idx describes 12: the \.idx belongs to another file")

    index = (tmp_path / "good.idx").read_bytes()
    short = pair("short")
    (tmp_path / "short.idx").write_bytes(index[:-8])
    refuse(short, r"short\.idx is truncated or damaged: 94 bytes instead of 102 for 3 sequences")
    for offset in (34 + 12, 34 + 12 + 2 * 8):  # where the first and the last sequence begin
        (tmp_path / "short.idx").write_bytes(index[:offset] + b"\x02" + index[offset + 1 :])
        refuse(short, r"short\.idx is damaged: its sequences do not follow each other")
    (tmp_path / "short.idx").write_bytes(index + bytes(3))
    refuse(short, r"short\.idx is a multimodal index, with a mode for each of its 3 sequences")
    (tmp_path / "short.idx").write_bytes(b"PK\x03\x04 something else altogether, but long enough")
    refuse(short, r"short\.idx is not a Megatron index")
    (tmp_path / "short.idx").write_bytes(index[:17] + b"\x09" + index[18:])
    refuse(short, r"type code 9 are not supported")
    (tmp_path / "short.idx").write_bytes(index[:-8] + (2).to_bytes(8, "little"))
    refuse(short, r"short\.idx is damaged: its last document ends at sequence 2")


@pytest.mark.parametrize("dtype", [np.dtype(kind.name) for kind in DType], ids=str)
def test_every_type_that_megatron_writes(tmp_path, dtype):
    documents = [[0, 1, 127], [5], [100, 2]]
    prefix = write_pair(tmp_path / "pair", documents, dtype=dtype.type)
    assert [ids.tolist() for ids in IndexedDataset(prefix)] == documents
    assert read_index(prefix).dtype == dtype
    assert token_range(prefix, 1, 2).tolist() == [5, 100, 2] and extreme_ids(prefix) == (0, 127)
    if dtype.kind == "f":
        for wrong in (1.5, np.inf):
            prefix = write_pair(tmp_path / "wrong", [[1, 2], [3, wrong]], dtype=dtype.type)
            with pytest.raises(ValueError, match=rf"wrong\.bin has {wrong} at token 3, which is no token id"):
                extreme_ids(prefix)
