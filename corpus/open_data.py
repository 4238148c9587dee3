"""Opens prepared data: the training stream and the held-out samples of whatever kind they are."""

from collections.abc import Callable

from conf.schema import DataConfig
from corpus.chat_stream import ChatStream, ChatWindows
from corpus.prepare import Prepared
from corpus.stream import HeldOut, Stream, TrainStream, ValidWindows


def training_stream(
    prepared: Prepared,
    data: DataConfig,
    *,
    sequence_length: int,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
) -> Stream:
    """The infinite stream of training samples; arguments as of TrainStream."""
    if data.kind == "chat":
        (source,) = prepared.train
        return ChatStream(source, data, sequence_length=sequence_length, seed=seed, note=note)
    return TrainStream(
        prepared,
        sequence_length=sequence_length,
        seed=seed,
        cache_dir=data.cache_dir,
        document_mask=data.document_mask,
        note=note,
    )


def held_out_samples(prepared: Prepared, data: DataConfig, *, sequence_length: int) -> HeldOut:
    """The held-out samples, in order."""
    if data.kind == "chat":
        (source,) = prepared.valid
        return ChatWindows(source, data, sequence_length=sequence_length)
    return ValidWindows(prepared, sequence_length=sequence_length, document_mask=data.document_mask)
