"""Reads and writes safetensors files: the length of the header, a JSON header, and the bytes of the tensors.

The header of a file of a checkpoint has the hash of every tensor, and the manifest the hash of the header: what is read
is verified while it is read, and a part of a file can be verified without the rest.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 2**24
"""Bytes that are read, written or hashed between two progress reports."""
_HEADER_LIMIT = 10**8
_METADATA, _DIGESTS = "__metadata__", "digests"
"""Of the header, where safetensors keeps strings of the writer's own, and the hashes of the tensors in it: a JSON
object."""
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
    """Hashes a file. Yields the number of bytes of each piece and returns the hexadecimal digest: that of the header if
    this has the digests of the tensors and they are right, otherwise that of all bytes."""
    try:
        with TensorFile(path) as file:
            if file.digests is not None:
                return file.header_digest if (yield from file.is_intact()) else ""
    except (CheckpointDamaged, KeyError, TypeError, ValueError):  # another kind of file, or one that has changed
        pass
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
        metadata: the `__metadata__` of the safetensors header; None: the digests of the tensors, and the digest that is
            returned is the header's.
    """
    ordered = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)  # keeps every tensor aligned
    entries: dict[str, Any] = {}
    end = 0
    for name in ordered:
        dtype, shape = kinds[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    digests = dict.fromkeys(ordered, new_digest().hexdigest())  # of the same length as those that take their place

    def header() -> bytes:
        text = json.dumps({_METADATA: dict(metadata) if metadata else {_DIGESTS: json.dumps(digests)}, **entries})
        return (text + " " * (-len(text) % 8)).encode()

    length = len(header())
    with path.open("wb", buffering=0) as file:
        _write(file, struct.pack("<Q", length), advance)
        _write(file, header(), advance)
        for name in ordered:
            found = new_digest()
            for part in parts(name):
                _write(file, _bytes_of(part.to(kinds[name][0])), advance, None if metadata else found)
            digests[name] = found.hexdigest()
        total, text = file.tell(), header()
        assert total == 8 + length + end and len(text) == length, (path, total, length, end)
        file.seek(8)
        _write(file, text, lambda count: None)
        os.fsync(file.fileno())
    return [total, _header_digest(text)]


def _header_digest(header: bytes) -> str:
    found = new_digest()
    found.update(header)
    return found.hexdigest()


def _write(file: Any, content: Any, advance: Callable[[int], None], found: Any = None) -> None:
    """Writes all bytes; adds them to a hash."""
    view = memoryview(content)
    for start in range(0, len(view), PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        if found is not None:
            found.update(piece)
        written = 0
        while written < len(piece):
            written += file.write(piece[written:])
        advance(len(piece))


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
            text = self._read(8, length)
            self._header, self.header_digest = json.loads(text), _header_digest(text)
            self._start = 8 + length
            assert isinstance(self._header, dict)
            metadata = self._header.pop(_METADATA, {})
            self.digests: dict[str, str] | None = json.loads(metadata[_DIGESTS]) if _DIGESTS in metadata else None
            """Of the tensors; None: a file of an earlier version, or not of a checkpoint."""
        except (ValueError, TypeError, RecursionError, AssertionError) as error:
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

    def is_intact(self) -> Iterator[int]:
        """Reads all tensors. Yields the number of bytes of each piece; returns whether every tensor has its digest."""
        assert self.digests is not None
        piece, right = bytearray(PIECE_BYTES), self._header.keys() == self.digests.keys()
        for name, entry in self._header.items():
            found, (start, end) = new_digest(), entry["data_offsets"]
            while start < end:
                view = memoryview(piece)[: min(PIECE_BYTES, end - start)]
                self._fill(self._start + start, view)
                found.update(view)
                start += len(view)
                yield len(view)
            right = right and found.hexdigest() == self.digests[name]
        return right

    def copy(
        self, name: str, shard: TensorShard, target: Tensor, offset: tuple[int, ...], *, verified: bool = False
    ) -> Iterator[int]:
        """Copies the elements that a stored shard and a target have in common, converted to the target's dtype. Yields
        the number of bytes of each piece and returns the number of elements copied.

        Args:
            offset: offset of the target in the logical tensor.
            verified: read and hash all of the shard, if its first element is in the target. Of several ranks whose
                targets make up the tensor, one then verifies the shard.
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
        verified = verified and self.digests is not None and first == [*shard.offset]
        if not target.dim():  # a scalar is treated as a tensor of one row
            target, first, last, offset, shard = target.view(1), [0], [1], (0,), TensorShard(shard.file, (0,), (1,))
        row, found = math.prod(shard.size[1:]), new_digest()
        rows = max(1, PIECE_BYTES // max(1, row * dtype.itemsize))
        inner = [slice(a - o, b - o) for a, b, o in zip(first[1:], last[1:], shard.offset[1:], strict=True)]
        there = [slice(a - o, b - o) for a, b, o in zip(first[1:], last[1:], offset[1:], strict=True)]
        end = shard.offset[0] + shard.size[0] if verified else last[0]
        for begun in range(first[0], end, rows):
            piece = torch.empty((min(rows, end - begun), *shard.size[1:]), dtype=dtype)
            content = _bytes_of(piece)
            self._fill(self._start + begin + (begun - shard.offset[0]) * row * dtype.itemsize, content)
            if verified:
                found.update(content)
            count = max(0, min(rows, last[0] - begun))
            rows_there = slice(begun - offset[0], begun - offset[0] + count)
            target[(rows_there, *there)].copy_(piece[(slice(0, count), *inner)])
            yield piece.nbytes
        if verified and self.digests is not None and self.digests.get(name) != found.hexdigest():
            raise CheckpointDamaged(f"{self._path.name} has changed since it was written: {name}")
        return math.prod(b - a for a, b in zip(first, last, strict=True))


def read_tensors(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    files: Mapping[str, list[Any]] | None = None,
) -> Iterator[int]:
    """Fills tensors with their parts of a checkpoint's logical tensors. Yields the number of bytes of each piece.

    Args:
        stored: the checkpoint's tensors.
        wanted: {name: (CPU tensor, its offset in the logical tensor)}.
        files: the manifest's, with which what is read is compared, if the files have digests of their tensors. None:
            they were verified before.

    Raises:
        CheckpointDamaged: a part is missing, has changed or cannot be read.
    """
    missing = {name: tensor.numel() for name, (tensor, _) in wanted.items()}
    by_file: dict[str, list[tuple[str, TensorShard]]] = {}
    for name in wanted:
        for shard in stored[name].shards if name in stored else ():
            by_file.setdefault(shard.file, []).append((name, shard))
    for file, shards in sorted(by_file.items()):
        try:
            with TensorFile(directory / file) as opened:
                if files is not None and opened.digests is not None and files[file][1] != opened.header_digest:
                    raise CheckpointDamaged(f"{file} has changed since it was written")
                for name, shard in shards:
                    missing[name] -= yield from opened.copy(name, shard, *wanted[name], verified=files is not None)
        except OSError as error:
            raise CheckpointDamaged(f"{file} cannot be read: {error}") from None
    if incomplete := [name for name, count in missing.items() if count]:
        raise CheckpointDamaged(f"{incomplete[0]} is incomplete")
