"""The samples of one source with data.packing_strategy=best_fit, over all epochs. Legend: S sequence, W documents of a
window, K samples of a window, G windows of a group.

A document of n tokens takes n - 1 places: each token but the last, whose label is the next one. One with more places
than a sequence is split into sequences of its own, and what remains is packed with the remainders of others by best-fit
decreasing. What is left of a sequence is padding, which is not routed and counts nowhere.

In an epoch the documents are shuffled by a keyed permutation and taken in windows of 2^18. A window is packed when a
sample of it is read, in a tenth of a second for the tens of thousands of samples that it has, and its samples are
shuffled. So memory does not depend on the number of documents. Only how many samples each window has takes a pass over
all lengths before it: these counts are files in the cache, one for each 16 windows, written ahead of time.
"""

import hashlib
from collections.abc import Container
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from corpus.cache import Cache, ReadOnlyCache
from corpus.indexed import TokenFile
from corpus.packing import Packs, best_fit
from corpus.permutation import Permutation
from corpus.prepare import Prepared, Source
from corpus.read_ahead import IndexAhead

_WINDOW = 1 << 18
"""Documents that are packed together."""
_GROUP = 16
"""Windows whose samples are counted together."""
_COUNTS = "counts.npy"


def open_packed(
    prepared: Prepared,
    cache: Cache,
    *,
    sequence_length: int,
    seed: int,
    document_mask: bool,
    ahead: bool = False,
    without: Container[int] = (),
) -> dict[int, "PackedEpochs"]:
    """The epochs of each source of the training data, by its number, without some."""
    return {
        number: PackedEpochs(source, sequence_length, [seed, number], cache, document_mask=document_mask, ahead=ahead)
        for number, source in enumerate(prepared.train)
        if number not in without
    }


class PackingShares(NamedTuple):
    """How documents fill the sequences of a window."""

    documents: int
    sequences: int
    padding: float
    """Share of the places that are padding."""
    cut: float
    """Share of the documents that are longer than a sequence, and so cut."""
    cut_if_concatenated: float
    """Share of the documents that would be expected to be cut if all were concatenated."""


def packing_note(sources: list[PackingShares]) -> str:
    """What the user is told about the first window of each source."""
    documents, sequences = (np.array(values) for values in list(zip(*sources, strict=True))[:2])
    padding = np.average([shares.padding for shares in sources], weights=sequences)
    cut, concatenated = (
        np.average([getattr(shares, name) for shares in sources], weights=documents)
        for name in ("cut", "cut_if_concatenated")
    )
    return (
        f"best-fit packing: {documents.sum():,} documents in {sequences.sum():,} sequences, {padding:.2%} padding; "
        f"{cut:.1%} of the documents are longer than a sequence and cut (concatenated: {concatenated:.1%})"
    )


class _Window(NamedTuple):
    documents_W: np.ndarray
    """The documents, numbered as in the source."""
    ends_W: np.ndarray
    """Full sequences of these documents and those before."""
    packs: Packs
    """The remainders in each further sequence, as indices into `documents_W`."""
    order: Permutation


class PackedEpochs:
    """The samples of one source. Not for several threads at once."""

    def __init__(
        self,
        source: Source,
        sequence_length: int,
        seed: list[int],
        cache: Cache,
        *,
        document_mask: bool,
        ahead: bool = False,
    ) -> None:
        """
        Args:
            document_mask: whether positions restart with each document.
            ahead: whether to count the samples of the next windows in the background.
        """
        self._file = TokenFile(source.prefix, source.id_limit)
        index = self._file.index
        ends = index.documents[[source.first_document, source.first_document + source.num_documents]]
        self._first, self._count = int(ends[0]), int(ends[1] - ends[0])
        self._lengths = index.lengths[ends[0] : ends[1]]
        self._size, self._seed, self._document_mask = sequence_length, seed, document_mask
        content = source.sha256 or hashlib.sha256(self._lengths.tobytes()).hexdigest()
        self._key: list[Any] = [content, self._first, self._count, sequence_length, _WINDOW, _GROUP, *seed]
        self._cache = cache
        self._windows = -(-self._count // _WINDOW)  # of an epoch
        self._groups = -(-self._windows // _GROUP)
        self._ahead = IndexAhead(self.index) if ahead else None
        self._ends: list[int] = []
        """The samples up to the end of each group, of all epochs."""
        self._open_group: tuple[int, np.ndarray] | None = None
        self._open_window: tuple[tuple[int, int], _Window] | None = None

    def num_samples(self, epochs: Fraction) -> int:
        """Of the first epochs, whose windows are all packed and counted."""
        whole, part = divmod(epochs, 1)
        counted = [
            sum(int(self._counts(epoch * self._groups + group).sum()) for group in range(self._groups))
            for epoch in range(whole + (part > 0))
        ]
        return sum(counted[:whole]) + (round(part * counted[-1]) if part else 0)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: tokens, labels, positions int64 [S], loss_mask float32 [S] and padding bool [S]."""
        group, at, size = self._group_of(index)
        if self._ahead:
            self._ahead.passed(group, at, size)
        return self._filled(self._parts(group, at))

    def request(self, index: int) -> None:
        """Requests what sample `index` will read, where the tokens are an object."""
        if self._file.is_object:
            group, at, _ = self._group_of(index)
            for document, begin, count in self._parts(group, at):
                self._file.request(self._begin(document) + begin, count + 1)

    def _group_of(self, index: int) -> tuple[int, int, int]:
        """The group of sample `index`, the sample's number there, and the group's samples."""
        while not self._ends or index >= self._ends[-1]:
            counts_G = self._counts(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + int(counts_G.sum()))
            if len(self._ends) == self._groups and not self._ends[-1]:
                raise ValueError(f"no document of {self._file.path} has two tokens, one to predict the other from")
        group = int(np.searchsorted(self._ends, index, side="right"))
        before = self._ends[group - 1] if group else 0
        return group, index - before, self._ends[group] - before

    def _parts(self, group: int, at: int) -> list[tuple[int, int, int]]:
        """The parts of documents in a sample of a group, as (document, first place, number of places)."""
        ends_G = np.cumsum(self._counts(group))
        of_group = int(np.searchsorted(ends_G, at, side="right"))
        at -= int(ends_G[of_group - 1]) if of_group else 0
        epoch, of_epoch = divmod(group, self._groups)
        window = self._window(epoch, of_epoch * _GROUP + of_group)
        (number,) = window.order.images(at, at + 1).tolist()
        full = int(window.ends_W[-1])
        if number < full:
            place = int(np.searchsorted(window.ends_W, number, side="right"))
            chunk = number - (int(window.ends_W[place - 1]) if place else 0)
            return [(int(window.documents_W[place]), chunk * self._size, self._size)]
        parts = []
        for document in window.documents_W[window.packs[number - full]].tolist():
            places = int(self._lengths[document]) - 1
            begin = places - places % self._size
            parts.append((document, begin, places - begin))
        return parts

    def _begin(self, document: int) -> int:
        """The number of tokens before a document of the source."""
        return self._file.index.begin(self._first + document)

    def _filled(self, parts: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
        """The sample with some parts of documents."""
        size, at = self._size, 0
        tokens_S, labels_S = np.zeros((2, size), dtype=np.int64)
        positions_S = np.arange(size)
        for document, begin, count in parts:
            text = self._file.read(self._begin(document) + begin, count + 1)
            tokens_S[at : at + count], labels_S[at : at + count] = text[:-1], text[1:]
            if self._document_mask:
                positions_S[at : at + count] = np.arange(count)
            at += count
        if self._document_mask:
            positions_S[at:] = np.arange(size - at)
        padding_S = torch.arange(size) >= at
        return {
            "tokens": torch.from_numpy(tokens_S),
            "labels": torch.from_numpy(labels_S),
            "positions": torch.from_numpy(positions_S),
            "loss_mask": (~padding_S).float(),
            "padding": padding_S,
        }

    def _window(self, epoch: int, number: int) -> _Window:
        if self._open_window is None or self._open_window[0] != (epoch, number):
            self._open_window = (epoch, number), self._pack(epoch, number)
        return self._open_window[1]

    def _pack(self, epoch: int, number: int) -> _Window:
        shuffled = Permutation(self._count, [*self._seed, epoch, 0])
        documents_W = shuffled.images(number * _WINDOW, min((number + 1) * _WINDOW, self._count))
        places_W = np.maximum(self._lengths[documents_W].astype(np.int64) - 1, 0)
        remainders_W = places_W % self._size
        left = np.flatnonzero(remainders_W)
        packs = best_fit(remainders_W[left], self._size)
        ends_W = np.cumsum(places_W // self._size)
        samples = int(ends_W[-1]) + len(packs)
        order = Permutation(max(samples, 1), [*self._seed, epoch, 1, number])
        return _Window(documents_W, ends_W, packs.renamed(left), order)

    def _count_samples(self, group: int) -> np.ndarray:
        epoch, of_epoch = divmod(group, self._groups)
        windows = range(of_epoch * _GROUP, min((of_epoch + 1) * _GROUP, self._windows))
        made = (self._pack(epoch, number) for number in windows)
        return np.array([int(window.ends_W[-1]) + len(window.packs) for window in made], dtype=np.int64)

    def _counts(self, group: int) -> np.ndarray:
        """The samples of each window of a group, counted over all epochs; int64 [G]."""
        if self._open_group is None or self._open_group[0] != group:
            try:
                counts_G = np.load(self.index(group) / _COUNTS, allow_pickle=False)
            except ReadOnlyCache:
                counts_G = self._count_samples(group)
            self._open_group = group, counts_G
        return self._open_group[1]

    def index(self, group: int) -> Path:
        """The cache entry with the counts of a group. If it does not exist, the first process that needs it makes it
        and the others wait.

        Raises:
            ReadOnlyCache: it does not exist, and the cache cannot be written to.
        """

        def build(folder: Path) -> None:
            np.save(folder / _COUNTS, self._count_samples(group), allow_pickle=False)

        return self._cache.entry("packed", [*self._key, group], build)

    def shares(self) -> PackingShares:
        """Of the first window."""
        window = self._window(0, 0)
        lengths_W = self._lengths[window.documents_W].astype(np.int64)
        places = int(np.maximum(lengths_W - 1, 0).sum())
        sequences = int(window.ends_W[-1]) + len(window.packs)
        # Concatenated, a document of n tokens is in one sample unless one ends at one of its n - 1 inner borders.
        return PackingShares(
            documents=len(lengths_W),
            sequences=sequences,
            padding=1 - places / max(sequences * self._size, 1),
            cut=float((lengths_W - 1 > self._size).mean()),
            cut_if_concatenated=float(np.minimum((lengths_W - 1) / self._size, 1).mean()),
        )
