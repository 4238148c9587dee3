"""The samples and batches of a run. Sample i of the training stream depends only on the data, the sequence length and
the seed, not on the length of the run, on where it resumed or on the rank. Legend: B batch, S sequence.

One epoch of a source is a Megatron-Core GPTDataset: documents are shuffled and concatenated, split into samples of S +
1 tokens that overlap by one, and the samples are shuffled. An index over several epochs would be shuffled differently
in a longer run. Therefore each epoch has an index with its own seed, built when its first sample is needed. The
remaining tokens of an epoch after its last complete sample, fewer than S, are dropped.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch

from corpus.cache import Cache, ReadOnlyCache
from corpus.indexed import OpenTokens, quiet_import, read_index, token_range
from corpus.prepare import Prepared, Source

with quiet_import():
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

# It warns about every index that is built in memory, as it is here.
logging.getLogger(GPTDataset.__module__).setLevel(logging.ERROR)

_BLEND_BLOCK = 1 << 16
_INDEX_PARTS = ("document_index", "sample_index", "shuffle_index")


class Stream(Protocol):
    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """tokens, labels, positions int64 [S] and, unless every label counts, loss_mask float32 [S]."""
        ...


class HeldOut(Stream, Protocol):
    """Held-out samples, which also have padding bool [S]: True for padding."""

    def __len__(self) -> int: ...


class TrainStream:
    """The infinite stream of training samples, a weighted blend of sources."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        sequence_length: int,
        seed: int,
        cache_dir: str,
        document_mask: bool,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            seed: seed of the order of the samples, >= 0.
            document_mask: whether positions restart after each end-of-document token.
            note: called with messages for the user, such as that a damaged index was rebuilt.
        """
        assert prepared.train and (prepared.eod_id is not None or not document_mask)
        cache = Cache(cache_dir, note)
        self._epochs = [
            _Epochs(source, sequence_length, [seed, number], cache) for number, source in enumerate(prepared.train)
        ]
        self._blend = _Blend([source.weight for source in prepared.train])
        self._eod_id = prepared.eod_id if document_mask else None

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` >= 0: tokens, labels and positions, int64 [S]. Without a loss_mask: every label counts."""
        source, index_in_source = self._blend.locate(index)
        item = self._epochs[source].sample(index_in_source)
        return {
            "tokens": item["tokens"],
            "labels": item["labels"],
            "positions": positions_within(item["tokens"], self._eod_id),
        }


class _Epochs:
    """The samples of one source, over all epochs."""

    def __init__(self, source: Source, sequence_length: int, seed: list[int], cache: Cache) -> None:
        index = read_index(source.prefix)
        first, end = index.documents[[source.first_document, source.first_document + source.num_documents]]
        self._sequences = np.arange(first, end)
        # Everything that the order of an epoch depends on, except its number.
        lengths = hashlib.sha256(index.lengths[first:end].tobytes()).hexdigest()
        self._key = [lengths, int(first), sequence_length, *seed]
        self._prefix = source.prefix
        self._sequence_length = sequence_length
        self._seed = seed
        self._cache = cache
        self._file = OpenTokens(source.prefix)
        self._tokens = IndexedDataset(source.prefix)
        self._samples_per_epoch = (source.num_tokens - 1) // sequence_length
        self._open: tuple[int, GPTDataset] | None = None

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        self._file.check()
        epoch, index_in_epoch = divmod(index, self._samples_per_epoch)
        if self._open is None or self._open[0] != epoch:
            self._open = (epoch, self._dataset(epoch))
        return self._open[1][index_in_epoch]

    def _dataset(self, epoch: int) -> GPTDataset:
        """The epoch's samples, its index memory-mapped from the cache.

        Megatron-Core writes an index on global rank 0 only, and reads it on the other ranks even if it is incomplete.
        Therefore the first rank that needs the epoch builds the index in memory (path_to_cache="") and saves it in
        `Cache`, whose lock makes the others wait; all ranks then load these files into a dataset with a deferred index.
        If the cache cannot be written to, every rank builds the same index in memory.
        """

        def build(folder: Path) -> None:
            built = self._gpt_dataset(epoch)
            for name in _INDEX_PARTS:
                np.save(folder / f"{name}.npy", getattr(built, name), allow_pickle=False)

        try:
            folder = self._cache.entry("epochs", [*self._key, epoch], build)
        except ReadOnlyCache:
            return self._gpt_dataset(epoch)
        dataset = self._gpt_dataset(epoch, defer_npy_index_mmap=True)
        for name in _INDEX_PARTS:
            setattr(dataset, name, np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        return dataset

    def _gpt_dataset(self, epoch: int, *, defer_npy_index_mmap: bool = False) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence([*self._seed, epoch]).generate_state(1)[0]),
            sequence_length=self._sequence_length,
            blend=([self._prefix], None),
            split="1",
            tokenizer=_NoTokenizer(),
            path_to_cache="",
            defer_npy_index_mmap=defer_npy_index_mmap,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return GPTDataset(self._tokens, self._prefix, self._sequences, None, Split.train, config)


class _NoTokenizer:
    """GPTDataset needs ids of the tokenizer only for masks, which are not created there."""

    eod = None
    vocab_size = None
    unique_identifiers: ClassVar[dict[str, str]] = {}


class _Blend:
    """The source of each sample: the one that is furthest behind its weight, computed by Megatron-Core's compiled
    helper. The source of sample i depends only on the samples before it, so that a longer table begins with the shorter
    one. The table takes 10 bytes per sample of the run."""

    def __init__(self, weights: list[float]) -> None:
        self._weights = np.array(weights, dtype=np.float64)
        self._grow(_BLEND_BLOCK)

    def _grow(self, size: int) -> None:
        self._source = np.zeros(size, dtype=np.int16)
        self._index_in_source = np.zeros(size, dtype=np.int64)
        helpers.build_blending_indices(
            self._source, self._index_in_source, self._weights, len(self._weights), size, False
        )

    def locate(self, index: int) -> tuple[int, int]:
        """The source of sample `index`, and its index within that source."""
        if len(self._weights) == 1:
            return 0, index
        if index >= len(self._source):
            self._grow(1 << index.bit_length())
        return int(self._source[index]), int(self._index_in_source[index])


class ValidWindows:
    """The held-out tokens in file order, split into windows of S tokens that do not overlap. The last window of a
    source is padded; each token except the first of a source is a label exactly once."""

    def __init__(self, prepared: Prepared, *, sequence_length: int, document_mask: bool) -> None:
        assert prepared.eod_id is not None or not document_mask
        self._files = [OpenTokens(source.prefix) for source in prepared.valid]
        self._sources = [token_range(s.prefix, s.first_document, s.num_documents) for s in prepared.valid]
        windows = [-(-(len(tokens) - 1) // sequence_length) for tokens in self._sources]
        self._ends = np.cumsum(windows)
        self._sequence_length = sequence_length
        self._eod_id = prepared.eod_id if document_mask else None

    def __len__(self) -> int:
        """Number of windows with at least one label."""
        return int(self._ends[-1])

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Window `index`: tokens, labels, positions int64 [S], loss_mask float32 [S] and padding bool [S]. Windows
        beyond the last one are padding with a loss_mask of 0, so that the last batch has the same size as the
        others."""
        size = self._sequence_length
        text = np.empty(0, dtype=np.int64)
        if index < len(self):
            source = int(np.searchsorted(self._ends, index, side="right"))
            self._files[source].check()
            start = (index - (self._ends[source - 1] if source else 0)) * size
            text = self._sources[source][start : start + size + 1].astype(np.int64)
        labels = max(len(text) - 1, 0)
        padded = torch.zeros(size + 1, dtype=torch.int64)
        padded[: len(text)] = torch.from_numpy(text)
        return {
            "tokens": padded[:-1].contiguous(),
            "labels": padded[1:].contiguous(),
            "loss_mask": (torch.arange(size) < labels).float(),
            "padding": torch.arange(size) >= len(text),
            "positions": positions_within(padded[:-1], self._eod_id),
        }


def positions_within(tokens: torch.Tensor, eod_id: int | None) -> torch.Tensor:
    """Positions int64 [S] of tokens [S], restarting at 0 after each end-of-document token. eod_id None: 0 to S - 1."""
    positions = torch.arange(len(tokens))
    if eod_id is None:
        return positions
    begins = torch.zeros_like(positions)
    begins[1:] = torch.where(tokens[:-1] == eod_id, positions[1:], 0)
    return positions - begins.cummax(0).values


def micro_batches(
    stream: Stream,
    *,
    first_sample: int,
    micro_batch_size: int,
    num_micro_batches: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of one step for a data-parallel rank, tensors [B, S].

    Samples are assigned in order: global micro-batch j * dp_size + dp_rank is this rank's j-th, and global
    micro-batch g has the B samples from first_sample + g * B.
    """
    for j in range(num_micro_batches):
        start = first_sample + (j * dp_size + dp_rank) * micro_batch_size
        samples = [stream.sample(index) for index in range(start, start + micro_batch_size)]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
