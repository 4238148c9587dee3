"""Opens prepared data: the training stream and the held-out samples of whatever kind they are."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from conf.blend_plan import StagePlan, blend_plan
from conf.blend_rules import part_names
from conf.schema import Config, DataConfig
from corpus.cache import Cache, ReadOnlyCache
from corpus.chat_stream import ChatStream, ChatWindows
from corpus.epochs import open_epochs
from corpus.packed_epochs import open_packed
from corpus.prepare import Prepared
from corpus.stream import HeldOut, Stream, TrainStream, ValidWindows, staged_blend


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
        return ChatStream(source, data, sequence_length=sequence_length, seed=seed, ahead=ahead, note=note)
    return TrainStream(
        prepared,
        sequence_length=sequence_length,
        seed=seed,
        cache_dir=data.cache_dir,
        document_mask=data.document_mask,
        plan=plan,
        packing_strategy=data.packing_strategy,
        ahead=ahead,
        note=note,
    )


def index_first_epoch(prepared: Prepared, data: DataConfig, *, sequence_length: int, seed: int) -> None:
    """Builds what the first step would otherwise wait for."""
    cache, how = Cache(data.cache_dir), {"sequence_length": sequence_length, "seed": seed}
    packed = data.packing_strategy == "best_fit"
    for epochs in (
        open_packed(prepared, cache, document_mask=data.document_mask, **how)
        if packed
        else open_epochs(prepared, cache, **how)
    ):
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
    sizes = [source.num_tokens for source in prepared.train]
    tokens = np.bincount([source.part for source in prepared.train], sizes, minlength=len(parts)).clip(min=1)
    epochs = []
    for part, size, (name, share) in zip(parts, tokens, shares.items(), strict=True):
        passed = f"{share * samples * train.sequence_length / size:.2f}" if part.epochs is None else f"{part.epochs:g}"
        epochs.append(f"{name} {passed}{'' if part.epochs is None else ' as set'}")
    shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return [("blend", shown, f"epochs in {train.steps} steps: {', '.join(epochs)}")]


def held_out_samples(prepared: Prepared, data: DataConfig, *, sequence_length: int) -> HeldOut:
    """The held-out samples, in order."""
    if data.kind == "chat":
        (source,) = prepared.valid
        return ChatWindows(source, data, sequence_length=sequence_length)
    return ValidWindows(prepared, sequence_length=sequence_length, document_mask=data.document_mask)


def held_out_parts(prepared: Prepared, config: Config) -> dict[str, HeldOut]:
    """The held-out samples of each part of a blend by its name; nothing unless eval.by_part."""
    length, parts = config.train.sequence_length, {}
    for number, name in enumerate(part_names(config.data.blend) if config.eval.by_part else ()):
        sources = [source for source in prepared.valid if source.part == number]
        if sources:
            of_part = replace(prepared, valid=sources)
            parts[name] = held_out_samples(of_part, config.data, sequence_length=length)
    return parts
