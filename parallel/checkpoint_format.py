"""Reads and writes safetensors files: the length of the header, a JSON header, and the bytes of the tensors.

The safetensors library can load these files too. It is not used here because it maps files into memory, where a disk
error ends the process with SIGBUS; a plain read raises an OSError that names the file.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 2**24
"""Bytes that are read, written or hashed between two progress reports."""
_HEADER_LIMIT = 10**8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointDamaged(ValueError):
    """A checkpoint is incomplete, corrupt or unreadable; the message says which part."""


@dataclass(frozen=True)
class TensorShard:
    """A rectangular part of a logical tensor, and the file that holds it under the tensor's name."""

    file: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass
class StoredTensor:
    """A logical tensor of a checkpoint."""

    shape: tuple[int, ...]
    shards: list[TensorShard]

    def is_complete(self) -> bool:
        """Whether every element is stored."""
        return sum(math.prod(size) for size in {b.offset: b.size for b in self.shards}.values()) == math.prod(
            self.shape
        )


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def digest(path: Path) -> Iterator[int]:
    """Hashes a file. Yields the number of bytes of each piece and returns the hexadecimal digest."""
    found, piece = new_digest(), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            found.update(piece[:count])
            yield count
    return found.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor], advance: Callable[[int], None]) -> list[Any]:
    """Writes CPU tensors to a file and flushes it to disk (fsync). Returns [bytes, digest] of the file.

    Args:
        advance: called with the number of bytes of each piece.

    Raises:
        OSError: it cannot be written.
    """
    kinds = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)}
    return write_stream(path, kinds, lambda name: [tensors[name]], advance)


def write_stream(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Callable[[str], Iterable[Tensor]],
    advance: Callable[[int], None] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
) -> list[Any]:
    """As `write_tensors`, for tensors that do not fit into memory together.

    Args:
        kinds: name -> dtype and shape of each tensor. Tensors with elements of the same size are written in this order.
        parts: name -> the tensor in pieces along dimension 0; called in the order of writing.
        metadata: the `__metadata__` of the safetensors header.
    """
    ordered = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in ordered:
        dtype, shape = kinds[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found, total = new_digest(), 0
    contents = (_bytes_of(part.to(kinds[name][0])) for name in ordered for part in parts(name))
    with path.open("wb", buffering=0) as file:
        for content in chain((struct.pack("<Q", len(text)), text), contents):
            view = memoryview(content)
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                found.update(piece)
                written = 0
                while written < len(piece):
                    written += file.write(piece[written:])
                total += len(piece)
                advance(len(piece))
        os.fsync(file.fileno())
    assert total == 8 + len(text) + end, (path, total, end)
    return [total, found.hexdigest()]


class TensorFile:
    """A safetensors file, opened for reading.

    Raises:
        OSError: it cannot be read.
        CheckpointDamaged: it is not a safetensors file.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("rb", buffering=0)
        (length,) = struct.unpack("<Q", self._read(0, 8))
        if length > _HEADER_LIMIT:
            raise CheckpointDamaged(f"{path.name} is not a safetensors file")
        try:
            self._header = json.loads(self._read(8, length))
            self._start = 8 + length
            assert isinstance(self._header, dict)
        except (ValueError, RecursionError, AssertionError) as error:
            raise CheckpointDamaged(f"{path.name} is not a safetensors file: {error}") from None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (safetensors dtype, shape) of every tensor.

        Raises:
            CheckpointDamaged: the header is invalid, or the file is truncated.
        """
        found, size, end = {}, os.fstat(self._file.fileno()).st_size - self._start, 0
        for name, entry in self._header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                width = DTYPES[dtype].itemsize if dtype in DTYPES else None
                if begin < 0 or (width and end - begin != math.prod(shape) * width):
                    raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointDamaged(f"{self._path.name}: invalid header entry of {name}: {error!r}") from None
            if end > size:
                raise CheckpointDamaged(f"{self._path.name} is truncated: {name} lies beyond its end")
            found[name] = dtype, shape
        return found

    def _read(self, start: int, count: int) -> bytes:
        content = bytearray(count)
        self._fill(start, memoryview(content))
        return bytes(content)

    def _fill(self, start: int, view: memoryview) -> None:
        while view:
            count = os.preadv(self._file.fileno(), [view], start)  # without a position that threads would share
            if not count:
                raise CheckpointDamaged(f"{self._path.name} is truncated")
            start, view = start + count, view[count:]

    def copy(self, name: str, shard: TensorShard, target: Tensor, offset: tuple[int, ...]) -> Iterator[int]:
        """Copies the elements that a stored shard and a target have in common, converted to the target's dtype. Yields
        the number of bytes of each piece and returns the number of elements copied.

        Args:
            offset: offset of the target in the logical tensor.
        """
        try:
            entry = self._header[name]
            dtype, stored, begin = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0]
            if stored != shard.size or not isinstance(begin, int) or begin < 0:
                raise ValueError(f"shape {stored}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointDamaged(f"{self._path.name} does not hold {name} {shard.size}: {error!r}") from None
        first = [max(a, b) for a, b in zip(shard.offset, offset, strict=True)]
        last = [min(a + n, b + m) for a, n, b, m in zip(shard.offset, shard.size, offset, target.shape, strict=True)]
        if any(a >= b for a, b in zip(first, last, strict=True)):
            return 0
        if not target.dim():  # a scalar is treated as a tensor of one row
            target, first, last, offset, shard = target.view(1), [0], [1], (0,), TensorShard(shard.file, (0,), (1,))
        row = math.prod(shard.size[1:])
        rows = max(1, PIECE_BYTES // max(1, row * dtype.itemsize))
        inner = [slice(a - o, b - o) for a, b, o in zip(first[1:], last[1:], shard.offset[1:], strict=True)]
        there = [slice(a - o, b - o) for a, b, o in zip(first[1:], last[1:], offset[1:], strict=True)]
        for begun in range(first[0], last[0], rows):
            count = min(rows, last[0] - begun)
            piece = torch.empty((count, *shard.size[1:]), dtype=dtype)
            self._fill(self._start + begin + (begun - shard.offset[0]) * row * dtype.itemsize, _bytes_of(piece))
            target[(slice(begun - offset[0], begun - offset[0] + count), *there)].copy_(piece[(slice(None), *inner)])
            yield piece.nbytes
        return math.prod(b - a for a, b in zip(first, last, strict=True))


def read_tensors(
    directory: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]]
) -> Iterator[int]:
    """Fills tensors with their parts of a checkpoint's logical tensors. Yields the number of bytes of each piece.

    Args:
        stored: the checkpoint's tensors.
        wanted: {name: (CPU tensor, its offset in the logical tensor)}.

    Raises:
        CheckpointDamaged: a part is missing or cannot be read.
    """
    missing = {name: tensor.numel() for name, (tensor, _) in wanted.items()}
    by_file: dict[str, list[tuple[str, TensorShard]]] = {}
    for name in wanted:
        for shard in stored[name].shards if name in stored else ():
            by_file.setdefault(shard.file, []).append((name, shard))
    for file, shards in sorted(by_file.items()):
        try:
            with TensorFile(directory / file) as opened:
                for name, shard in shards:
                    missing[name] -= yield from opened.copy(name, shard, *wanted[name])
        except OSError as error:
            raise CheckpointDamaged(f"{file} cannot be read: {error}") from None
    if incomplete := [name for name, count in missing.items() if count]:
        raise CheckpointDamaged(f"{incomplete[0]} is incomplete")
