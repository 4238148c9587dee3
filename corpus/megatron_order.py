"""The order of samples of runs that began before `parallel.checkpoint_manifest.DATA_ORDER` was 2, which they keep: that
of Megatron-Core's GPTDataset, whose index has an entry for each sequence and each sample, and of its blends.

An index over several epochs would be shuffled differently in a longer run. Therefore each epoch has an index with its
own seed, built when its first sample is needed.
"""

import hashlib
import logging
from pathlib import Path
from typing import ClassVar

import numpy as np

from corpus.cache import Cache, ReadOnlyCache
from corpus.indexed import TokenFile, quiet_import
from corpus.prepare import Source

with quiet_import():
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

# It warns about every index that is built in memory, as it is here.
logging.getLogger(GPTDataset.__module__).setLevel(logging.ERROR)

_BLEND_BLOCK = 1 << 16
_INDEX_PARTS = ("document_index", "sample_index", "shuffle_index")


class MegatronEpochs:
    """The samples of one source, over all epochs."""

    def __init__(self, source: Source, sequence_length: int, seed: list[int], cache: Cache) -> None:
        self._file = TokenFile(source.prefix)
        index = self._file.index
        first, end = index.documents[[source.first_document, source.first_document + source.num_documents]]
        self._sequences = np.arange(first, end)
        # Everything that the order of an epoch depends on, except its number.
        lengths = hashlib.sha256(index.lengths[first:end].tobytes()).hexdigest()
        self._key = [lengths, int(first), sequence_length, *seed]
        self._prefix = source.prefix
        self._sequence_length = sequence_length
        self._seed = seed
        self._cache = cache
        self._tokens = IndexedDataset(source.prefix)
        self._samples_per_epoch = (source.num_tokens - 1) // sequence_length
        self._open: tuple[int, GPTDataset] | None = None

    def sample(self, index: int) -> np.ndarray:
        """The tokens of sample `index`, int64 [S + 1]."""
        self._file.check()
        epoch, index_in_epoch = divmod(index, self._samples_per_epoch)
        if self._open is None or self._open[0] != epoch:
            self._open = (epoch, self._dataset(epoch))
        item = self._open[1][index_in_epoch]
        return np.append(item["tokens"].numpy(), item["labels"][-1].numpy())

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


class GreedyBlend:
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
