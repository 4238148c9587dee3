"""Megatron token files: PREFIX.bin has the concatenated token ids of all documents, PREFIX.idx their lengths.

They are written (`corpus/pair_writer.py`), read and validated without importing Megatron-Core, so that a damaged file
is found immediately and on a login node.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from corpus.cache import Cache
from corpus.documents import nearest_existing
from corpus.object_blocks import ObjectBlocks, bin_size, described
from corpus.pair_writer import HEADER, MAGIC

# megatron.core.datasets.indexed_dataset.DType. Ids in floating point have to be whole numbers.
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_SCAN_TOKENS = 16 * 1024 * 1024
_SCAN_SEQUENCES = 1024 * 1024


@dataclass(frozen=True)
class Index:
    """An .idx file, memory-mapped."""

    dtype: type[np.number]
    lengths: np.ndarray
    """Number of tokens of each sequence, int32 [N]."""
    pointers: np.ndarray
    """Where each sequence begins in the .bin, in bytes; int64 [N]."""
    documents: np.ndarray
    """The first sequence of each document, then N; int64 [documents + 1]. A document usually is one sequence."""

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def begin(self, sequence: int) -> int:
        """The number of tokens before a sequence; of N, of all tokens."""
        if sequence < len(self.lengths):
            return int(self.pointers[sequence]) // np.dtype(self.dtype).itemsize
        return self.begin(sequence - 1) + int(self.lengths[sequence - 1]) if sequence else 0

    def num_tokens(self, first_document: int, num_documents: int) -> int:
        """Number of tokens of a range of documents."""
        first, end = self.documents[first_document], self.documents[first_document + num_documents]
        return self.begin(int(end)) - self.begin(int(first))


def read_index(prefix: str) -> Index:
    """Opens PREFIX.idx and validates all of it, and the size of PREFIX.bin. Reads the file in chunks.

    Raises:
        ValueError: a file is missing or is not in Megatron's format, or the two do not match.
    """
    index = _map_index(prefix)
    _check_documents(index, prefix)
    _check_size(prefix, int(index.lengths.sum(dtype=np.int64)) * np.dtype(index.dtype).itemsize)
    _check_pointers(index, prefix)
    return index


def open_index(prefix: str) -> Index:
    """Opens a pair that `read_index` has validated, in a time that does not depend on its size.

    Raises:
        ValueError: a file is missing, or has another size.
    """
    index = _map_index(prefix)
    _check_size(prefix, index.begin(len(index.lengths)) * np.dtype(index.dtype).itemsize)
    return index


def checked_index(prefix: str, cache: Cache) -> Index:
    """As `read_index`; files that have not changed since then are not read again."""
    _check_files(prefix)
    size = bin_size(prefix)

    def validate(idx_path: str) -> bool:
        read_index(prefix)
        return True

    cache.fact(prefix + ".idx", f"valid for {size} bytes", validate)
    return open_index(prefix)


def _check_files(prefix: str) -> None:
    for path in (prefix + ".idx",) if described(prefix) else (prefix + ".bin", prefix + ".idx"):
        if not os.path.isfile(path):
            hint = nearest_existing(path)
            if prefix.endswith((".bin", ".idx")):
                hint = f"; give the prefix only: {prefix[:-4]}"
            raise ValueError(f"{path} does not exist{hint}")


def _map_index(prefix: str) -> Index:
    _check_files(prefix)
    idx_path = prefix + ".idx"
    with open(idx_path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise ValueError(f"{idx_path} is not a Megatron index: it does not begin with {MAGIC!r}")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{idx_path}: version {version} and type code {code} are not supported")
    size = HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if os.path.getsize(idx_path) == size + num_sequences and num_sequences:
        raise ValueError(
            f"{idx_path} is a multimodal index, with a mode for each of its {num_sequences} sequences; "
            "only text is supported: create the pair again without modes"
        )
    if os.path.getsize(idx_path) != size:
        raise ValueError(
            f"{idx_path} is truncated or damaged: {os.path.getsize(idx_path)} bytes instead of {size} "
            f"for {num_sequences} sequences; create it again"
        )
    raw = np.memmap(idx_path, mode="r", offset=0)
    lengths = np.frombuffer(raw, np.int32, num_sequences, HEADER.size)
    pointers = np.frombuffer(raw, np.int64, num_sequences, HEADER.size + num_sequences * 4)
    documents = np.frombuffer(raw, np.int64, num_boundaries, HEADER.size + num_sequences * (4 + 8))
    return Index(_DTYPES[code], lengths, pointers, documents)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _SCAN_SEQUENCES) for start in range(0, count, _SCAN_SEQUENCES))


def _check_documents(index: Index, prefix: str) -> None:
    lengths, documents = index.lengths, index.documents
    if (
        len(documents) == 0
        or documents[0] != 0
        or any((lengths[chunk] < 0).any() for chunk in _chunks(len(lengths)))
        or any((documents[1:][chunk] < documents[:-1][chunk]).any() for chunk in _chunks(len(documents) - 1))
    ):
        raise ValueError(f"{prefix}.idx is damaged: lengths are negative or documents out of order; create it again")
    if documents[-1] != len(lengths):
        raise ValueError(f"{prefix}.idx is damaged: its last document ends at sequence {documents[-1]}")


def _check_size(prefix: str, expected: int) -> None:
    actual = bin_size(prefix)
    if expected != actual:
        why = "the .bin is truncated" if actual < expected else "the .idx belongs to another file"
        raise ValueError(
            f"{prefix}.bin has {actual} bytes, but {prefix}.idx describes {expected}: {why}; create the pair again"
        )


def _check_pointers(index: Index, prefix: str) -> None:
    """Checks that each sequence begins where the previous one ends."""
    expected, itemsize = 0, np.dtype(index.dtype).itemsize
    for chunk in _chunks(len(index.pointers)):
        ends = expected + np.cumsum(index.lengths[chunk], dtype=np.int64) * itemsize
        begins = index.pointers[chunk]
        if begins[0] != expected or (begins[1:] != ends[:-1]).any():
            raise ValueError(f"{prefix}.idx is damaged: its sequences do not follow each other; create it again")
        expected = int(ends[-1])


class TokenFile:
    """An open pair. Tokens are read from PREFIX.bin by position, not through a memory mapping: reading a page beyond
    the end of a file that was truncated would kill the process (SIGBUS) without a message. PREFIX.bin may be an object
    that is read by blocks.

    Raises:
        ValueError: as `open_index`.
    """

    def __init__(self, prefix: str, id_limit: int | None = None) -> None:
        """
        Args:
            id_limit: ids must be smaller. None: they were all checked before.
        """
        self.prefix, self.path = prefix, prefix + ".bin"
        self.index, self._id_limit = open_index(prefix), id_limit
        self._object = ObjectBlocks(prefix) if described(prefix) else None
        if self._object:
            self.path = self._object.url
        self._itemsize = np.dtype(self.index.dtype).itemsize
        self._size = self.index.begin(len(self.index.lengths)) * self._itemsize
        if self._object is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)

    @property
    def is_object(self) -> bool:
        return self._object is not None

    def request(self, begin: int, count: int) -> None:
        """What `read` is going to read is requested, if it is an object, without waiting for it."""
        if self._object:
            self._object.request(begin * self._itemsize, (begin + count) * self._itemsize)

    def read(self, begin: int, count: int) -> np.ndarray:
        """`count` tokens from position `begin` of the file, int64.

        Raises:
            OSError: the file has become smaller, or the object cannot be read.
            ValueError: the object has an id that the vocabulary does not have.
        """
        if self._object:
            return self._read_object(self._object, begin, count)
        size, offset, data = count * self._itemsize, begin * self._itemsize, b""
        while len(data) < size:
            part = os.pread(self._file.fileno(), size - len(data), offset + len(data))
            if not part:
                raise self._truncated()
            data += part
        return np.frombuffer(data, self.index.dtype).astype(np.int64)

    def _read_object(self, source: ObjectBlocks, begin: int, count: int) -> np.ndarray:
        try:
            data = source.read(begin * self._itemsize, (begin + count) * self._itemsize)
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be read: {error.strerror or error}. The blocks that have arrived are kept: start "
                "again with the same run.dir"
            ) from error
        ids = np.frombuffer(data, self.index.dtype)
        if self._id_limit is not None and (wrong := np.flatnonzero(~is_id(ids, self._id_limit))).size:
            raise ValueError(
                f"{self.path} has {ids[wrong[0]]} at token {begin + int(wrong[0]):,}, but ids are whole numbers from 0 "
                f"to {self._id_limit - 1}; set data.tokenizer to the one that the file was created with, or "
                "model.vocab_size to more"
            )
        return ids.astype(np.int64)

    def check(self) -> None:
        """Raises OSError if the file has become smaller: called before pages of it are read through a mapping."""
        if os.fstat(self._file.fileno()).st_size < self._size:
            raise self._truncated()

    def _truncated(self) -> OSError:
        return OSError(
            f"{self.path} was truncated while it was in use: {os.fstat(self._file.fileno()).st_size} bytes instead of "
            f"{self._size}. Stop whatever writes to it, create the file again (files in data.cache_dir are rebuilt "
            "automatically), then resume the run with the same run.dir"
        )


def is_id(ids: np.ndarray, limit: int | None) -> np.ndarray:
    """bool, of each number. None: ids have no limit."""
    inside = (ids >= 0) & (ids < (np.inf if limit is None else limit))
    return inside & (ids == np.floor(ids)) if ids.dtype.kind == "f" else inside


def extreme_ids(prefix: str) -> tuple[int, int]:
    """Smallest and largest token id of a non-empty file; reads all of it, in chunks.

    Raises:
        ValueError: a number in floating point is not whole.
    """
    tokens = np.memmap(prefix + ".bin", dtype=open_index(prefix).dtype, mode="r")
    chunks = [tokens[start : start + _SCAN_TOKENS] for start in range(0, len(tokens), _SCAN_TOKENS)]
    for number, chunk in enumerate(chunks if tokens.dtype.kind == "f" else ()):
        if (wrong := np.flatnonzero(~np.isfinite(chunk) | (chunk != np.floor(chunk)))).size:
            at = number * _SCAN_TOKENS + int(wrong[0])
            raise ValueError(f"{prefix}.bin has {tokens[at]} at token {at:,}, which is no token id")
    return min(int(chunk.min()) for chunk in chunks), max(int(chunk.max()) for chunk in chunks)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Suppresses warnings while Megatron-Core is imported: its own about optional packages, and PyTorch's about a CUDA
    toolkit without a GPU, as on a login node."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
