"""The samples of one source over all epochs. Legend: S sequence, M samples of an epoch, N positions of a chunk.

In an epoch the sequences of a token file (a document usually is one) are shuffled and concatenated, split into samples
of S + 1 tokens that overlap by one, and the samples are shuffled. Both orders are keyed permutations, which are
computed where they are needed. Only where each sample begins takes a pass over all lengths: this index is a file in
the cache, which one process writes in chunks, ahead of time, and all memory-map. What a rank holds does not depend on
the number of documents.
"""

import hashlib
from collections.abc import Container, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corpus.cache import Cache, ReadOnlyCache
from corpus.indexed import TokenFile
from corpus.permutation import Permutation
from corpus.prepare import Prepared, Source
from corpus.read_ahead import IndexAhead

_CHUNK = 1 << 18
"""Positions that are computed at once."""
_SAMPLES = 1 << 12
"""Samples whose order is computed at once."""
_STARTS = "starts.npy"


def open_epochs(
    prepared: Prepared,
    cache: Cache,
    *,
    sequence_length: int,
    seed: int,
    ahead: bool = False,
    without: Container[int] = (),
) -> dict[int, "Epochs"]:
    """The epochs of each source of the training data, by its number, without some."""
    return {
        number: Epochs(source, sequence_length, [seed, number], cache, ahead=ahead)
        for number, source in enumerate(prepared.train)
        if number not in without
    }


class _Epoch(NamedTuple):
    number: int
    sequences: Permutation
    samples: Permutation
    starts: np.ndarray
    """Of each sample, before they are shuffled, and of the end: position among the shuffled sequences, and offset in
    the sequence there. int64 [M + 1, 2]."""


class Epochs:
    """The samples of one source. Not for several threads at once."""

    def __init__(self, source: Source, sequence_length: int, seed: list[int], cache: Cache, *, ahead: bool) -> None:
        """
        Args:
            ahead: whether to index the next epoch in the background once half of an epoch has passed.
        """
        self._file = TokenFile(source.prefix, source.id_limit)
        index = self._file.index
        ends = index.documents[[source.first_document, source.first_document + source.num_documents]]
        self._first, self._count = int(ends[0]), int(ends[1] - ends[0])
        self._lengths = index.lengths[ends[0] : ends[1]]
        self._sequence_length, self._seed = sequence_length, seed
        self._per_epoch = (source.num_tokens - 1) // sequence_length
        content = source.sha256 or hashlib.sha256(self._lengths.tobytes()).hexdigest()
        # Everything that the order of an epoch depends on, except its number.
        self._key: list[Any] = [content, self._first, self._count, sequence_length, *seed]
        self._cache = cache
        self._ahead = IndexAhead(self.index) if ahead else None
        self._open: _Epoch | None = None
        self._block, self._order = (-1, -1), np.empty(0, dtype=np.int64)
        """Epoch and number of a block of samples, and their order."""

    def num_samples(self, epochs: Fraction) -> int:
        """Of the first epochs."""
        return round(epochs * self._per_epoch)

    def sample(self, index: int) -> np.ndarray:
        """The tokens of sample `index`, int64 [S + 1]."""
        if self._ahead:
            self._ahead.passed(*divmod(index, self._per_epoch), self._per_epoch)
        return np.concatenate([self._file.read(start, count) for start, count in self._places(index)])

    def request(self, index: int) -> None:
        """Requests what sample `index` will read, where the tokens are an object."""
        if self._file.is_object:
            for start, count in self._places(index):
                self._file.request(start, count)

    def _unshuffled(self, epoch: _Epoch, at: int) -> int:
        """The number of the epoch's sample `at` before they are shuffled."""
        block, offset = divmod(at, _SAMPLES)
        if self._block != (epoch.number, block):
            first = block * _SAMPLES
            self._order = epoch.samples.images(first, min(first + _SAMPLES, self._per_epoch))
            self._block = epoch.number, block
        return int(self._order[offset])

    def _places(self, index: int) -> list[tuple[int, int]]:
        """Where the tokens of sample `index` are: ranges of the file, as position and number."""
        number, at = divmod(index, self._per_epoch)
        if self._open is None or self._open.number != number:
            self._open = self._epoch(number)
        epoch, sample = self._open, self._unshuffled(self._open, at)
        (first, begin), (last, end) = epoch.starts[sample].tolist(), epoch.starts[sample + 1].tolist()
        parts = []
        for sequence in epoch.sequences.images(first, last + 1).tolist():
            parts.append([self._file.index.begin(self._first + sequence), int(self._lengths[sequence])])
        parts[-1][1] = end + 1  # the last label is the first token of the next sample
        parts[0][0], parts[0][1] = parts[0][0] + begin, parts[0][1] - begin
        return [(start, count) for start, count in parts if count]

    def _epoch(self, number: int) -> _Epoch:
        sequences = self._shuffled(number)
        samples = Permutation(self._per_epoch, [*self._seed, number, 1])
        try:
            starts = np.load(self.index(number) / _STARTS, mmap_mode="r", allow_pickle=False)
        except ReadOnlyCache:
            starts = np.concatenate([*self._starts(sequences)])
        return _Epoch(number, sequences, samples, starts)

    def _shuffled(self, number: int) -> Permutation:
        """The order of the sequences in an epoch."""
        return Permutation(self._count, [*self._seed, number, 0])

    def index(self, number: int) -> Path:
        """The cache entry with the index of an epoch. If it does not exist, the first process that needs it builds it
        and the others wait.

        Raises:
            ReadOnlyCache: it does not exist, and the cache cannot be written to.
        """

        def build(folder: Path) -> None:
            shape = self._per_epoch + 1, 2
            with (folder / _STARTS).open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
                for part in self._starts(self._shuffled(number)):
                    file.write(part.tobytes())

        return self._cache.entry("samples", [*self._key, number], build)

    def _starts(self, sequences: Permutation) -> Iterator[np.ndarray]:
        """`_Epoch.starts` in parts, int64 [., 2]."""
        tokens, samples, size = 0, 0, self._sequence_length  # tokens and starts of samples before this chunk
        for first in range(0, self._count, _CHUNK):
            lengths_N = self._lengths[sequences.images(first, min(first + _CHUNK, self._count))]
            ends_N = tokens + np.cumsum(lengths_N, dtype=np.int64)
            tokens = int(ends_N[-1])
            begins = np.arange(samples, -(-tokens // size), dtype=np.int64) * size  # multiples of S before `tokens`
            at = np.searchsorted(ends_N, begins, side="right")
            samples += len(begins)
            yield np.stack([first + at, begins - ends_N[at] + lengths_N[at]], axis=1)
        assert samples == self._per_epoch + 1
