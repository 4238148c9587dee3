"""Writes a .bin/.idx pair in memory that does not grow with it, and continues one where it was left.

Legend: N tokens, P pieces of documents, D documents.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document boundaries
_TYPE_CODES = {"int32": 4, "uint16": 8}
_FEWER_IDS = 65_500
"""Megatron-Core writes 16 bits for vocabularies with fewer ids than this (DType.optimal_dtype)."""
_LENGTHS = ".lengths"
_CHUNK = 1 << 20
_LONGEST = 2**31 - 1


class Position(NamedTuple):
    """How much of a pair is written."""

    documents: int = 0
    tokens: int = 0


NOTHING = Position()


def dtype_of(vocab_size: int) -> np.dtype:
    """The type that Megatron-Core would write."""
    return np.dtype(np.uint16 if vocab_size < _FEWER_IDS else np.int32)


class PairWriter:
    """Appends documents to PREFIX.bin; `finish` writes PREFIX.idx. Until then the lengths of the documents are in a
    file of their own."""

    def __init__(self, prefix: str, dtype: np.dtype, start: Position = NOTHING) -> None:
        """
        Args:
            start: what to keep of the files of an earlier writer; what it wrote after that is cut off.

        Raises:
            ValueError: the files are shorter than that.
        """
        self.prefix, self._dtype = prefix, dtype
        self._documents, self._tokens = start
        self._open = 0  # tokens of an incomplete document
        self._bin = _open_at(f"{prefix}.bin", start.tokens * dtype.itemsize)
        self._lengths = _open_at(f"{prefix}{_LENGTHS}", start.documents * 4)

    @property
    def position(self) -> Position:
        """What is written of whole documents."""
        assert not self._open
        return Position(self._documents, self._tokens)

    def append(self, last_P: np.ndarray, tokens_N: np.ndarray, lengths_P: np.ndarray) -> None:
        """Writes the next pieces of documents.

        Args:
            last_P: whether a piece ends its document, bool.
            tokens_N: of all pieces, one after the other.
            lengths_P: tokens of each piece, int64.

        Raises:
            ValueError: a document has more tokens than the format allows.
        """
        self._bin.write(tokens_N.astype(self._dtype, copy=False).tobytes())
        ends_P = self._open + np.cumsum(lengths_P)
        ends_D = ends_P[last_P]
        self._open = int(ends_P[-1] - (ends_D[-1] if len(ends_D) else 0)) if len(ends_P) else self._open
        lengths_D = np.diff(ends_D, prepend=0)
        if len(lengths_D) and lengths_D.max() > _LONGEST:
            raise ValueError(f"a document has {lengths_D.max():,} tokens; an .idx file allows {_LONGEST:,}")
        self._lengths.write(lengths_D.astype(np.int32).tobytes())
        self._documents += len(lengths_D)
        self._tokens += len(tokens_N)

    def sync(self) -> None:
        """Returns once everything is on the disk."""
        for file in (self._bin, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Writes the .idx file. The lengths are left for `remove_lengths`, since a process may be killed before the
        caller has recorded that the pair is complete."""
        assert not self._open
        self.sync()
        with open(f"{self.prefix}.idx", "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, _TYPE_CODES[self._dtype.name], self._documents, self._documents + 1))
            for lengths_D in self._chunks():
                file.write(lengths_D.tobytes())
            begin = 0
            for lengths_D in self._chunks():
                ends_D = begin + np.cumsum(lengths_D, dtype=np.int64) * self._dtype.itemsize
                file.write((ends_D - lengths_D.astype(np.int64) * self._dtype.itemsize).tobytes())
                begin = int(ends_D[-1])
            for first in range(0, self._documents + 1, _CHUNK):
                file.write(np.arange(first, min(first + _CHUNK, self._documents + 1), dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self._bin.close()
        self._lengths.close()

    def _chunks(self) -> Iterator[np.ndarray]:
        with open(f"{self.prefix}{_LENGTHS}", "rb") as file:
            while part := file.read(_CHUNK * 4):
                yield np.frombuffer(part, np.int32)


def remove_lengths(prefix: str) -> None:
    """Removes what `PairWriter.finish` has left."""
    Path(f"{prefix}{_LENGTHS}").unlink(missing_ok=True)


def _open_at(path: str, size: int) -> IO[bytes]:
    """A file to append to after its first `size` bytes.

    Raises:
        ValueError: it has fewer.
    """
    if not size:
        return open(path, "wb")
    if not os.path.isfile(path) or os.path.getsize(path) < size:
        raise ValueError(f"{path} is shorter than {size} bytes")
    file = open(path, "r+b")  # noqa: SIM115 (closed by the writer)
    file.truncate(size)
    file.seek(size)
    return file
