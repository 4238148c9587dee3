"""Checks that prepared data are enough to train and evaluate on."""

from dataclasses import replace
from typing import TYPE_CHECKING

from conf.schema import DataConfig
from corpus.dataset_specs import is_chat

if TYPE_CHECKING:
    from corpus.prepare import Prepared, Source

_NAMED = 3


def check_conversations(prepared: "Prepared", data: DataConfig, held_out_only: bool) -> None:
    if not prepared.train and not held_out_only:
        raise ValueError("no conversation is left to train on; lower data.valid_fraction or add conversations")
    if not prepared.valid:
        raise ValueError("no conversation is held out; set data.valid_files, or raise data.valid_fraction")


def without_short_files(prepared: "Prepared", sequence_length: int, data: DataConfig) -> "Prepared":
    """The data without training files that are shorter than a sequence, such as the shard of a task of which filters
    have left little: of parts that have longer ones, and not with data.strict. A part keeps its weight."""

    def is_short(source: "Source") -> bool:
        return source.num_tokens <= sequence_length and not is_chat(data, source.part)

    kept = [source for source in prepared.train if not is_short(source)]
    usable = {source.part for source in kept}
    short = list(filter(is_short, prepared.train))
    if not short or data.strict or {source.part for source in prepared.train} != usable:
        return prepared
    before, after = (
        {part: sum(source.weight for source in sources if source.part == part) for part in usable}
        for sources in (prepared.train, kept)
    )
    kept = [
        replace(source, weight=source.weight * before[source.part] / (after[source.part] or 1.0)) for source in kept
    ]
    named = "; ".join(f"{source.prefix}.bin: {source.num_tokens} tokens" for source in short[:_NAMED])
    more = f"; and {len(short) - _NAMED} more" if len(short) > _NAMED else ""
    note = f"shorter than a sequence of {sequence_length + 1} tokens: left out (an error with data.strict=true): "
    return replace(prepared, train=kept, notes=[*prepared.notes, note + named + more])


def check_training(prepared: "Prepared", sequence_length: int, data: DataConfig) -> None:
    if not prepared.train:
        raise ValueError("no document is left to train on; lower data.valid_fraction or add text")
    for source in prepared.train:
        if source.num_tokens <= sequence_length and not is_chat(data, source.part):
            raise ValueError(
                f"too little text: {source.num_tokens} tokens to train on ({source.prefix}.bin), but one sequence "
                f"takes {sequence_length + 1}; add text or set train.sequence_length={source.num_tokens - 1} or less"
            )


def check_held_out(prepared: "Prepared", sequence_length: int, data: DataConfig) -> None:
    if not prepared.valid:
        raise ValueError("a single document cannot be split; set data.valid_files to held-out text, or add documents")
    texts = [source.num_tokens for source in prepared.valid if not is_chat(data, source.part)]
    tokens = sum(texts)
    if texts and tokens <= sequence_length:
        more = "name more data.valid_files" if data.valid_files else f"raise data.valid_fraction={data.valid_fraction}"
        raise ValueError(
            f"the held-out text has {tokens} tokens, but one sequence takes {sequence_length + 1}; "
            f"{more} or set train.sequence_length={tokens - 1} or less"
        )
