"""The samples of data=chat: conversations, several to a sequence or one, each with positions of its own and a loss
weight per label. Legend: S sequence.

A conversation of n tokens takes n - 1 places: each token but the last, whose label is the next one. So no label belongs
to another conversation, and the loss of a conversation is the same wherever it is packed. What is left of a sequence is
padding: a document of its own that is not routed and counts nowhere.
"""

import hashlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from conf.schema import DataConfig
from corpus.cache import Cache, ReadOnlyCache
from corpus.conversations import FIRST_LABEL, WEIGHTS
from corpus.indexed import TokenFile
from corpus.packing import Packs, best_fit
from corpus.prepare import Source
from corpus.read_ahead import IndexAhead
from corpus.tokenizer import Tokenizer

_WINDOW = 1 << 13
"""Conversations that are packed together: many enough to fill sequences, few enough to keep them in random order."""


class Conversations:
    """The tokenised conversations of a source, those too long truncated or left out."""

    def __init__(self, source: Source, *, sequence_length: int, too_long: str) -> None:
        self._file = TokenFile(source.prefix)
        self._weights = np.memmap(source.prefix + WEIGHTS, dtype=np.float32, mode="r")
        lengths = self._file.index.lengths.astype(np.int64)
        self._begins = np.cumsum(lengths) - lengths
        self.digest, self.sequence_length = source.sha256, sequence_length
        exceeding = lengths - 1 > sequence_length
        self.places = np.minimum(lengths - 1, sequence_length)
        """Places in a sequence that each conversation takes."""
        first_label = np.fromfile(source.prefix + FIRST_LABEL, dtype=np.int32)
        keep = first_label <= self.places if too_long == "truncate" else ~exceeding
        self.kept = np.flatnonzero(keep)
        """The conversations that are used."""
        self.num_truncated, self.num_dropped = int((exceeding & keep).sum()), int((~keep).sum())
        if not len(self.kept):
            longest = int(lengths.min())
            raise ValueError(
                f"every conversation of {source.prefix} is too long for train.sequence_length={sequence_length}; "
                f"the shortest has {longest} tokens: set train.sequence_length={longest - 1} or more"
            )

    def sequence(self, members: np.ndarray) -> dict[str, torch.Tensor]:
        """The sequence with these conversations: tokens, labels, positions int64 [S], loss_mask float32 [S] and padding
        bool [S]."""
        size = self.sequence_length
        tokens, labels, positions = np.zeros((3, size), dtype=np.int64)
        weights, at = np.zeros(size, dtype=np.float32), 0
        for member in members:
            begin, count = int(self._begins[member]), int(self.places[member])
            text = self._file.read(begin, count + 1)
            here = slice(at, at + count)
            tokens[here], labels[here] = text[:-1], text[1:]
            weights[here] = self._weights[begin + 1 : begin + count + 1]
            positions[here] = np.arange(count)
            at += count
        positions[at:] = np.arange(size - at)
        values = {"tokens": tokens, "labels": labels, "positions": positions, "loss_mask": weights}
        sample = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
        return sample | {"padding": torch.arange(size) >= at}

    def note(self, packs: Packs, too_long: str) -> str:
        """What the user is told about how the sequences are filled."""
        share = 1 - self.places[self.kept].sum() / (len(packs) * self.sequence_length)
        text = (
            f"{len(self.kept):,} conversations in {len(packs):,} sequences of {self.sequence_length} tokens: "
            f"{share:.1%} padding"
        )
        text += f"; {self.num_truncated:,} too long: truncated" if self.num_truncated else ""
        if self.num_dropped:
            why = "too long" if too_long == "drop" else "without a token of the assistant before they are truncated"
            text += f"; {self.num_dropped:,} {why}: left out"
        return text


def pack_epoch(chats: Conversations, *, packing: bool, seed: list[int] | None) -> Packs:
    """
    Args:
        seed: of the order of the conversations and of the sequences. None: the order of the file, all of it packed
            together.
    """
    generator = None if seed is None else np.random.default_rng(np.random.SeedSequence(seed))
    order = chats.kept if generator is None else generator.permutation(chats.kept)
    if not packing:
        return Packs(order, np.arange(1, len(order) + 1))
    window = len(order) if generator is None else _WINDOW
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        packs += [part[pack].tolist() for pack in best_fit(chats.places[part], chats.sequence_length)]
    if generator is not None:
        packs = [packs[i] for i in generator.permutation(len(packs))]
    return Packs.of(packs)


class ChatStream:
    """The infinite stream of training samples. Sample i depends only on the data, the sequence length and the seed: an
    epoch is packed by its own seed, and its number of sequences follows from that."""

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        *,
        sequence_length: int,
        seed: list[int],
        ahead: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            seed: of the order; in a blend, another one for each source.
            ahead: whether this process packs the next epoch in the background, for all on its node.
            note: called with messages for the user: how much is padding, and what was too long.
        """
        self._chats = Conversations(source, sequence_length=sequence_length, too_long=data.too_long)
        self._packing, self._seed = data.packing, seed
        self._cache = Cache(data.cache_dir, note)
        kept = hashlib.sha256(self._chats.kept.tobytes()).hexdigest()
        self._key: list[Any] = [self._chats.digest, kept, sequence_length, data.packing, _WINDOW, *seed]
        self._ends: list[int] = []
        self._open: tuple[int, Packs] | None = None
        self._ahead = IndexAhead(self._load) if ahead else None
        note(self._chats.note(self._packs(0), data.too_long))

    def num_samples(self, epochs: Fraction) -> int:
        """Of the first epochs, which are all packed."""
        whole, part = divmod(epochs, 1)
        counted = [len(self._packs(epoch)) for epoch in range(whole + (part > 0))]
        return sum(counted[:whole]) + (round(part * counted[-1]) if part else 0)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` >= 0, as `Conversations.sequence`."""
        while not self._ends or index >= self._ends[-1]:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._packs(len(self._ends))))
        epoch = int(np.searchsorted(self._ends, index, side="right"))
        begin = self._ends[epoch - 1] if epoch else 0
        if self._ahead:
            self._ahead.passed(epoch, index - begin, self._ends[epoch] - begin)
        return self._chats.sequence(self._packs(epoch)[index - begin])

    def _packs(self, epoch: int) -> Packs:
        if self._open is None or self._open[0] != epoch:
            self._open = (epoch, self._load(epoch))
        return self._open[1]

    def _load(self, epoch: int) -> Packs:
        def build() -> Packs:
            return pack_epoch(self._chats, packing=self._packing, seed=[*self._seed, epoch])

        try:
            return Packs.load(
                self._cache.entry("chat_epochs", [*self._key, epoch], lambda folder: build().save(folder))
            )
        except ReadOnlyCache:
            return build()


class ChatWindows:
    """The held-out conversations, each once, packed like those of training."""

    def __init__(self, source: Source, data: DataConfig, *, sequence_length: int) -> None:
        self._chats = Conversations(source, sequence_length=sequence_length, too_long=data.too_long)
        self._packs = pack_epoch(self._chats, packing=data.packing, seed=None)

    def __len__(self) -> int:
        return len(self._packs)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sequence `index`, as `Conversations.sequence`; beyond the last one, padding alone."""
        return self._chats.sequence(self._packs[index] if index < len(self) else np.empty(0, dtype=np.int64))


def describe_example(sample: dict[str, torch.Tensor], tokenizer: Tokenizer, max_tokens: int = 512) -> str:
    """The first conversation of a sample as text for the user, with what is not trained on in [[ ]]."""
    starts = (sample["positions"] == 0).nonzero().flatten().tolist()
    end = min(starts[1] if len(starts) > 1 else len(sample["positions"]), max_tokens)
    ids = [*sample["tokens"][:1].tolist(), *sample["labels"][:end].tolist()]
    trained = [False, *(sample["loss_mask"][:end] > 0).tolist()]
    pieces, begin = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or trained[i] != trained[begin]:
            text = tokenizer.decode(ids[begin:i])
            pieces.append(text if trained[begin] else f"[[{text}]]")
            begin = i
    return f"an example; what is in [[ ]] is not trained on:\n{''.join(pieces)}"
