"""Tensor files: plain safetensors, read in part, by whoever knows the format, without running any code."""

import errno
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from parallel import checkpoint_format
from parallel.checkpoint_format import DTYPES, CheckpointDamaged, StoredTensor, TensorShard, read_tensors, write_tensors
from parallel.checkpoint_manifest import run_to_completion
from parallel.random_state import dtype_of, random_state, restore_random_state


def test_another_library_reads_what_is_written_and_the_reverse(tmp_path):
    tensors = {name: (torch.arange(6) % 2).view(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0), "transposed": torch.randn(3, 5).T}
    size, _ = write_tensors(tmp_path / "ours", tensors, lambda _: None)
    assert size == (tmp_path / "ours").stat().st_size
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs")
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype
        read = torch.empty(tensor.shape, dtype=tensor.dtype)
        whole = StoredTensor(tuple(tensor.shape), [TensorShard("theirs", (0,) * tensor.dim(), tuple(tensor.shape))])
        run_to_completion(read_tensors(tmp_path, {name: whole}, {name: (read, (0,) * tensor.dim())}))
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("piece", [16, 2**24])
def test_any_box_is_put_together_from_any_boxes(tmp_path, monkeypatch, piece):
    """Four files hold a quarter each; every box of the whole is read from what they share with it."""
    monkeypatch.setattr(checkpoint_format, "PIECE_BYTES", piece)
    whole, shards = torch.arange(4 * 6 * 3).float().view(4, 6, 3), []
    for row in (0, 2):
        for column in (0, 3):
            name = f"{row}{column}"
            part = whole[row : row + 2, column : column + 3]
            write_tensors(tmp_path / name, {"other": torch.ones(5), "x": part}, lambda _: None)
            shards.append(TensorShard(name, (row, column, 0), (2, 3, 3)))
    stored = {"x": StoredTensor((4, 6, 3), shards)}
    assert stored["x"].is_complete()
    for first, last in [((0, 0, 0), (4, 6, 3)), ((1, 2, 1), (3, 5, 2)), ((3, 5, 0), (4, 6, 3)), ((0, 3, 0), (2, 6, 3))]:
        target = torch.empty([b - a for a, b in zip(first, last, strict=True)], dtype=torch.bfloat16)
        run_to_completion(read_tensors(tmp_path, stored, {"x": (target, first)}))
        assert torch.equal(target.float(), whole[tuple(map(slice, first, last))])
    stored["x"].shards.pop()
    assert not stored["x"].is_complete()
    with pytest.raises(CheckpointDamaged, match="x is incomplete"):
        run_to_completion(read_tensors(tmp_path, stored, {"x": (torch.empty(4, 6, 3), (0, 0, 0))}))


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(**changed: object) -> bytes:
    said = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}
    return framed(json.dumps({"x": said}).encode(), b"\0" * 8)


BROKEN = {
    "empty": b"",
    "a huge header": struct.pack("<Q", 2**60),
    "a header that ends early": struct.pack("<Q", 100) + b"{",
    "no JSON": framed(b"\x80\x04K\x01."),
    "nested JSON": framed(b"[" * 100_000),
    "a list": framed(b"[]"),
    "no such tensor": framed(b"{}"),
    "an entry in words": framed(b'{"x": "y"}'),
    "an unknown type": entry(dtype="F31"),
    "another shape": entry(shape=[3]),
    "a negative place": entry(data_offsets=[-8, 0]),
    "a place beyond the end": entry(data_offsets=[4096, 4104]),
    "a place in words": entry(data_offsets=["a", "b"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_of_another_kind_is_damage(tmp_path, what):
    (tmp_path / "file").write_bytes(BROKEN[what])
    stored = {"x": StoredTensor((2,), [TensorShard("file", (0,), (2,))])}
    with pytest.raises(CheckpointDamaged, match="file "):
        run_to_completion(read_tensors(tmp_path, stored, {"x": (torch.empty(2), (0,))}))


def test_what_cannot_be_read_is_damage(tmp_path):
    stored = {"x": StoredTensor((2,), [TensorShard("file", (0,), (2,))])}
    with pytest.raises(CheckpointDamaged, match=f"file cannot be read: .*{errno.ENOENT}"):
        run_to_completion(read_tensors(tmp_path, stored, {"x": (torch.empty(2), (0,))}))


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(),
        float(np.random.rand()),
        np.random.standard_normal(),
        torch.rand(()).item(),
    ]


def test_generators_go_on_where_they_were(runtime):
    random.gauss()  # of two, the second is kept for later
    np.random.standard_normal()
    kept = random_state()
    assert all(tensor.dtype == dtype_of(name) for name, tensor in kept.items())
    first = draws()
    assert draws() != first
    restore_random_state(kept)
    assert draws() == first


def test_nothing_of_the_reader_unpickles():
    """Neither it nor what it is made of; torch.load and pickle stay out of parallel/checkpoint*.py."""
    for path in Path(checkpoint_format.__file__).parent.glob("*.py"):
        if path.name.startswith(("checkpoint", "random_state", "optimizer_state")):
            assert not any(
                word in path.read_text() for word in ("import pickle", "torch.load(", "dist_checkpointing.load")
            )


def read_halves(path: Path, size: int, digest: str) -> list[str]:
    """What the readers of the upper, and of the left, half of a tensor say, and of those of the other halves."""
    stored, told = {"x": StoredTensor((8, 6), [TensorShard(path.name, (0, 0), (8, 6))])}, []
    for shape, offset in (((4, 6), (0, 0)), ((4, 6), (4, 0)), ((8, 3), (0, 0)), ((8, 3), (0, 3))):
        wanted = {"x": (torch.empty(shape), offset)}
        try:
            run_to_completion(read_tensors(path.parent, stored, wanted, {path.name: [size, digest]}))
            told.append("")
        except CheckpointDamaged as error:
            told.append(str(error))
    return told


def test_one_of_several_readers_verifies_what_it_does_not_need(tmp_path, monkeypatch):
    """Of every stored shard the reader of its first element hashes all, in however many pieces it is read."""
    path = tmp_path / "file"
    for piece in (2**24, 48):
        monkeypatch.setattr(checkpoint_format, "PIECE_BYTES", piece)
        size, digest = write_tensors(path, {"x": torch.randn(8, 6), "other": torch.ones(3)}, lambda _: None)
        assert read_halves(path, size, digest) == ["", "", "", ""]
        content = path.read_bytes()
        with checkpoint_format.TensorFile(path) as file:
            start, (begin, end) = file._start, file._header["x"]["data_offsets"]
        for place in range(begin, end, 37):
            changed = bytearray(content)
            changed[start + place] ^= 4
            path.write_bytes(changed)
            told = read_halves(path, size, digest)
            assert [one == "file has changed since it was written: x" for one in told] == [True, False, True, False]
            assert run_to_completion(checkpoint_format.digest(path)) != digest
        path.write_bytes(content.replace(b'"other"', b'"Other"'))
        assert all("file has changed since it was written" in one for one in read_halves(path, size, digest))
