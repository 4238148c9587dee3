"""Opens prepared data: the training stream and the held-out samples of whatever kind they are."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch

from conf.blend_plan import StagePlan, blend_plan
from conf.blend_rules import part_names
from conf.schema import Config, DataConfig
from corpus.cache import Cache, ReadOnlyCache
from corpus.chat_stream import ChatStream, ChatWindows
from corpus.dataset_specs import is_chat
from corpus.epochs import open_epochs
from corpus.packed_epochs import open_packed
from corpus.prepare import Prepared
from corpus.stream import HeldOut, OfObjects, Stream, TrainStream, ValidWindows, staged_blend


def training_stream(
    prepared: Prepared,
    data: DataConfig,
    *,
    sequence_length: int,
    seed: int,
    plan: Sequence[StagePlan] = (),
    ahead: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Stream:
    """The infinite stream of training samples; arguments as of TrainStream."""
    if data.kind == "chat":
        (source,) = prepared.train
        return ChatStream(source, data, sequence_length=sequence_length, seed=[seed], ahead=ahead, note=note)
    how = {"sequence_length": sequence_length, "seed": seed, "ahead": ahead, "note": note}
    return TrainStream(
        prepared,
        cache_dir=data.cache_dir,
        document_mask=data.document_mask,
        plan=plan,
        packing_strategy=data.packing_strategy,
        chats=open_chats(prepared, data, **how),
        **how,
    )


def open_chats(
    prepared: Prepared,
    data: DataConfig,
    *,
    sequence_length: int,
    seed: int,
    ahead: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[int, ChatStream]:
    """The samples of those sources of a blend that are conversations, by their numbers; arguments as of ChatStream."""
    names = part_names(data.blend)
    return {
        number: ChatStream(
            source,
            data,
            sequence_length=sequence_length,
            seed=[seed, number],
            ahead=ahead,
            note=lambda text, name=names[source.part]: note(f"{name}: {text}"),
        )
        for number, source in enumerate(prepared.train)
        if data.kind == "blend" and is_chat(data, source.part)
    }


def example_chat(stream: Stream) -> dict[str, torch.Tensor] | None:
    """A sample of conversations, if the stream has any."""
    if isinstance(stream, TrainStream):
        stream = next(iter(stream.chats.values()), stream)
    return stream.sample(0) if isinstance(stream, ChatStream) else None


def index_first_epoch(prepared: Prepared, data: DataConfig, *, sequence_length: int, seed: int) -> None:
    """Builds what the first step would otherwise wait for."""
    cache, how = Cache(data.cache_dir), {"sequence_length": sequence_length, "seed": seed}
    packed = data.packing_strategy == "best_fit"
    how["without"] = [number for number, source in enumerate(prepared.train) if is_chat(data, source.part)]
    opened = (
        open_packed(prepared, cache, document_mask=data.document_mask, **how)
        if packed
        else open_epochs(prepared, cache, **how)
    )
    for epochs in opened.values():
        with suppress(ReadOnlyCache):  # then each rank builds it in memory
            epochs.index(0)


class PartShares:
    """The share of each part of a blend in the training samples, counted, not sampled."""

    def __init__(self, prepared: Prepared, config: Config) -> None:
        self._names = part_names(config.data.blend)
        self._part = np.array([source.part for source in prepared.train])
        self._blend = staged_blend(prepared, blend_plan(config))

    def between(self, first: int, end: int) -> dict[str, float]:
        """{name: share} of the samples from `first` to before `end`."""
        counts = self._blend.counts(end) - self._blend.counts(first)
        shares = np.bincount(self._part, weights=counts, minlength=len(self._names)) / (end - first)
        return dict(zip(self._names, shares.tolist(), strict=True))


def blend_row(prepared: Prepared, config: Config) -> list[tuple[str, str, str]]:
    """The row of a blend in the start table: of each part its share of the run, and how often the run passes through
    it."""
    if config.data.kind != "blend":
        return []
    train, parts = config.train, config.data.blend
    samples = train.steps * train.global_batch_size
    shares = PartShares(prepared, config).between(0, samples)
    sizes = {"sequence_length": train.sequence_length, "seed": train.seed}
    chats = open_chats(prepared, config.data, **sizes)
    sequences = [
        chats[number].num_samples(Fraction(1)) if number in chats else source.num_tokens / train.sequence_length
        for number, source in enumerate(prepared.train)
    ]
    of_part = np.bincount([source.part for source in prepared.train], sequences, minlength=len(parts)).clip(
        min=1 / train.sequence_length
    )
    epochs = []
    for part, size, (name, share) in zip(parts, of_part, shares.items(), strict=True):
        passed = f"{share * samples / size:.2f}" if part.epochs is None else f"{part.epochs:g}"
        epochs.append(f"{name} {passed}{'' if part.epochs is None else ' as set'}")
    shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return [("blend", shown, f"epochs in {train.steps} steps: {', '.join(epochs)}")]


def held_out_samples(prepared: Prepared, data: DataConfig, *, sequence_length: int) -> HeldOut:
    """The held-out samples, in order: text, then conversations."""
    chats = [source for source in prepared.valid if is_chat(data, source.part)]
    texts = [source for source in prepared.valid if not is_chat(data, source.part)]
    parts: list[HeldOut] = [ChatWindows(source, data, sequence_length=sequence_length) for source in chats]
    if texts:
        of_text = replace(prepared, valid=texts)
        parts.insert(0, ValidWindows(of_text, sequence_length=sequence_length, document_mask=data.document_mask))
    return parts[0] if len(parts) == 1 else _Joined(parts)


class _Joined:
    """Held-out samples of several kinds, one after the other."""

    def __init__(self, parts: Sequence[HeldOut]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])
        self.is_object = any(isinstance(part, OfObjects) and part.is_object for part in parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`; beyond the last one, padding alone."""
        part, number = self._place(index)
        return part.sample(number)

    def request(self, index: int) -> None:
        """Requests what sample `index` will read, where that is an object."""
        part, number = self._place(index)
        if isinstance(part, OfObjects):
            part.request(number)

    def _place(self, index: int) -> tuple[HeldOut, int]:
        part = min(int(np.searchsorted(self._ends, index, side="right")), len(self._parts) - 1)
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)


def held_out_parts(prepared: Prepared, config: Config) -> dict[str, HeldOut]:
    """The held-out samples of each part of a blend by its name; nothing unless eval.by_part."""
    length, parts = config.train.sequence_length, {}
    for number, name in enumerate(part_names(config.data.blend) if config.eval.by_part else ()):
        sources = [source for source in prepared.valid if source.part == number]
        if sources:
            windows = held_out_samples(replace(prepared, valid=sources), config.data, sequence_length=length)
            if len(windows):  # one token alone is the label of nothing
                parts[name] = windows
    return parts
