"""The samples and batches of a run. Sample i of the training stream depends only on the data, the sequence length and
the seed, not on the length of the run, on where it resumed or on the rank. Legend: B batch, S sequence.

A source is read epoch by epoch, each in an order of its own (`corpus/epochs.py`). The remaining tokens of an epoch
after its last complete sample, fewer than S, are dropped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from conf.blend_plan import StagePlan
from corpus.blend import AnyBlend, Blend, QuotaBlend, StagedBlend
from corpus.cache import Cache
from corpus.epochs import Epochs, open_epochs
from corpus.indexed import TokenFile
from corpus.packed_epochs import PackedEpochs, open_packed, packing_note
from corpus.prepare import Prepared, Source
from parallel.checkpoint_manifest import DATA_ORDER


class Stream(Protocol):
    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """tokens, labels, positions int64 [S] and, unless every label counts, loss_mask float32 [S]."""
        ...


class HeldOut(Stream, Protocol):
    """Held-out samples, which also have padding bool [S]: True for padding."""

    def __len__(self) -> int: ...


@runtime_checkable
class OfObjects(Protocol):
    """Samples that may be read from objects."""

    is_object: bool
    """Whether some are."""

    def request(self, index: int) -> None:
        """Requests what sample `index` will read, where that is an object, without waiting for it."""
        ...


class _Source(Protocol):
    def sample(self, index: int) -> np.ndarray: ...


class _Locate(Protocol):
    def locate(self, index: int) -> tuple[int, int]: ...


def _has_objects(sources: Sequence[Source]) -> bool:
    """Whether some of the tokens are read from objects."""
    return any(source.id_limit is not None for source in sources)


def staged_blend(prepared: Prepared, plan: Sequence[StagePlan]) -> StagedBlend:
    """The blend of the sources of the training data.

    Args:
        plan: of a blend (`conf.blend_plan`); none for other data.
    """
    sources = prepared.train
    if not plan:
        return StagedBlend([(0, Blend([source.weight for source in sources]))])
    assert all((source.quotas is None) == (not plan[-1].epochs[source.part]) for source in sources)
    stages: list[tuple[int, AnyBlend]] = []
    for number, stage in enumerate(plan):
        factors = [now / before if before else 0.0 for now, before in zip(stage.weights, plan[0].weights, strict=True)]
        weights = [source.weight * factors[source.part] for source in sources]
        quotas = [source.quotas[number] if source.quotas is not None else 0 for source in sources]
        blend = QuotaBlend(quotas, weights, stage.end - stage.begin) if any(quotas) else Blend(weights)
        stages.append((stage.begin, blend))
    return StagedBlend(stages)


class TrainStream:
    """The infinite stream of training samples, a weighted blend of sources. Not for several threads at once."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        sequence_length: int,
        seed: int,
        cache_dir: str,
        document_mask: bool,
        plan: Sequence[StagePlan] = (),
        packing_strategy: str = "concatenate",
        chats: Mapping[int, Stream] = MappingProxyType({}),
        ahead: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            seed: seed of the order of the samples, >= 0.
            document_mask: whether positions restart after each end-of-document token.
            plan: as of `staged_blend`.
            packing_strategy: data.packing_strategy.
            chats: the samples of those sources that are conversations, by their numbers.
            ahead: whether this process builds the indices of later epochs in the background, for all on its node.
            note: called with messages for the user, such as that a damaged index was rebuilt.
        """
        assert prepared.train and (prepared.eod_id is not None or not document_mask)
        cache = Cache(cache_dir, note)
        self._prepared, self._sequence_length, self._seed, self._cache = prepared, sequence_length, seed, cache
        self._plan = plan
        self._blend: _Locate = staged_blend(prepared, plan)
        self.chats = chats
        how = {"sequence_length": sequence_length, "seed": seed, "ahead": ahead, "without": chats}
        self._epochs: Mapping[int, _Source] = {}
        self._packed: dict[int, PackedEpochs] = {}
        if packing_strategy == "best_fit":
            self._packed = open_packed(prepared, cache, document_mask=document_mask, **how)
            if self._packed:
                note(packing_note([epochs.shares() for epochs in self._packed.values()]))
        else:
            self._epochs = open_epochs(prepared, cache, **how)
        self._eod_id = prepared.eod_id if document_mask else None
        self.is_object = _has_objects(prepared.train)

    def keep_order(self, version: int) -> None:
        """Takes the samples in the order that a run began with, before the first sample is read.

        Args:
            version: `parallel.checkpoint_manifest.DATA_ORDER` of that time.

        Raises:
            ValueError: the order is that of a newer version.
        """
        if version == DATA_ORDER:
            return
        if version > DATA_ORDER:
            raise ValueError(
                f"the run takes its samples in order {version}; this version of Switchyard knows {DATA_ORDER} and "
                "earlier ones. Continue with the version that began it, or choose another run.dir"
            )
        if self._packed:
            raise ValueError(
                f"data.packing_strategy=best_fit needs a run that takes its samples in order {DATA_ORDER}; this one "
                "was begun by an earlier version of Switchyard. Start another run from its weights (checkpoint.load), "
                "or set data.packing_strategy=concatenate"
            )
        if len(self._plan) > 1 or any(source.quotas for source in self._prepared.train):
            raise ValueError(
                f"data.stages, and epochs in data.blend, need a run that takes its samples in order {DATA_ORDER}; this "
                "one was begun by an earlier version of Switchyard. Start another run from its weights "
                "(checkpoint.load), or set data.stages=[] and weights"
            )
        if self.chats:
            raise ValueError(
                f"a part of kind chat in data.blend needs a run that takes its samples in order {DATA_ORDER}; this one "
                "was begun by an earlier version of Switchyard. Start another run from its weights (checkpoint.load)"
            )
        if self.is_object:
            raise ValueError(
                f"token files at URLs are read by blocks only in order {DATA_ORDER}; this run was begun by an earlier "
                "version of Switchyard: set data.objects=copy"
            )
        from corpus.megatron_order import GreedyBlend, MegatronEpochs

        sources = self._prepared.train
        self._blend = GreedyBlend([source.weight for source in sources])
        self._epochs = {
            number: MegatronEpochs(source, self._sequence_length, [self._seed, number], self._cache)
            for number, source in enumerate(sources)
        }

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` >= 0: tokens, labels and positions, int64 [S]. Without a loss_mask: every label counts. With
        best-fit packing as of `PackedEpochs.sample`, and so with conversations in the blend: all samples of a stream
        have the same entries."""
        source, index_in_source = self._blend.locate(index)
        if source in self.chats:
            return self.chats[source].sample(index_in_source)
        if self._packed:
            return self._packed[source].sample(index_in_source)
        text = torch.from_numpy(self._epochs[source].sample(index_in_source))
        tokens = text[:-1].contiguous()
        sample = {
            "tokens": tokens,
            "labels": text[1:].contiguous(),
            "positions": positions_within(tokens, self._eod_id),
        }
        if self.chats:
            sample |= {"loss_mask": torch.ones(len(tokens)), "padding": torch.zeros(len(tokens), dtype=torch.bool)}
        return sample

    def request(self, index: int) -> None:
        """Requests what sample `index` will read, where that is an object."""
        source, index_in_source = self._blend.locate(index)
        if source not in self.chats:
            opened = (self._packed or self._epochs)[source]
            assert isinstance(opened, Epochs | PackedEpochs)  # `keep_order` refuses objects in another order
            opened.request(index_in_source)


class ValidWindows:
    """The held-out tokens in file order, split into windows of S tokens that do not overlap. The last window of a
    source is padded; each token except the first of a source is a label exactly once."""

    def __init__(self, prepared: Prepared, *, sequence_length: int, document_mask: bool) -> None:
        assert prepared.eod_id is not None or not document_mask
        self._files = [TokenFile(source.prefix, source.id_limit) for source in prepared.valid]
        self._begins = [
            f.index.num_tokens(0, s.first_document) for f, s in zip(self._files, prepared.valid, strict=True)
        ]
        self._tokens = [source.num_tokens for source in prepared.valid]
        windows = [-(-(tokens - 1) // sequence_length) for tokens in self._tokens]
        self._ends = np.cumsum(windows)
        self._sequence_length = sequence_length
        self._eod_id = prepared.eod_id if document_mask else None
        self.is_object = _has_objects(prepared.valid)

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
            file, start, count = self._place(index)
            text = file.read(start, count)
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

    def request(self, index: int) -> None:
        """Requests what window `index` will read, where that is an object."""
        if index < len(self):
            file, start, count = self._place(index)
            file.request(start, count)

    def _place(self, index: int) -> tuple[TokenFile, int, int]:
        """The file of a window, and there the position and number of its tokens."""
        size = self._sequence_length
        source = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[source - 1]) if source else 0)) * size
        return self._files[source], self._begins[source] + start, min(size + 1, self._tokens[source] - start)


def positions_within(tokens: torch.Tensor, eod_id: int | None) -> torch.Tensor:
    """Positions int64 [S] of tokens [S], restarting at 0 after each end-of-document token. eod_id None: 0 to S - 1."""
    positions = torch.arange(len(tokens))
    if eod_id is None:
        return positions
    begins = torch.zeros_like(positions)
    begins[1:] = torch.where(tokens[:-1] == eod_id, positions[1:], 0)
    return positions - begins.cummax(0).values


@dataclass(frozen=True)
class BatchShard:
    """The samples of a global batch that one data-parallel rank reads. They are assigned in order: global micro-batch
    j * dp_size + dp_rank is this rank's j-th, and global micro-batch g has the B samples from first_sample + g * B."""

    first_sample: int
    micro_batch_size: int
    num_micro_batches: int
    dp_rank: int
    dp_size: int

    def samples(self) -> Iterator[range]:
        """The indices of each micro-batch's samples."""
        for j in range(self.num_micro_batches):
            start = self.first_sample + (j * self.dp_size + self.dp_rank) * self.micro_batch_size
            yield range(start, start + self.micro_batch_size)

    def micro_batches(self, stream: Stream) -> Iterator[dict[str, torch.Tensor]]:
        """The samples read from the stream, tensors [B, S]."""
        for indices in self.samples():
            samples = [stream.sample(index) for index in indices]
            yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def request(self, stream: Stream) -> None:
        """Requests what `micro_batches` will read, where that is in objects."""
        if isinstance(stream, OfObjects) and stream.is_object:
            for indices in self.samples():
                for index in indices:
                    stream.request(index)
