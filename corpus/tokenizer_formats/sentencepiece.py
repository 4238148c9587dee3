"""SentencePiece models (.model), of the kinds unigram and BPE.

The file is a Protocol Buffers message, of which few fields are needed, so that neither `protobuf` nor `sentencepiece`
has to be installed. Field numbers: sentencepiece_model.proto, ModelProto. Of two splits of a text that are equally
probable under a unigram model, such as `0 0 000` and `0 000 0`, SentencePiece may take the other one: it adds in fp32.
Rules of normalisation are applied by `tokenizers`, to a grapheme at a time as in Transformers: a character with a
combining mark, a modifier or a joiner may become another than in SentencePiece, which applies them to the characters.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"


@dataclass(frozen=True)
class _Model:
    pieces: list[tuple[str, float, int]]
    """(text, score, type) by id."""
    kind: int
    byte_fallback: bool
    space_as_suffix: bool
    charsmap: bytes
    """Normalisation of characters, compiled."""
    dummy_prefix: bool
    """Whether a space is put before a text."""
    remove_spaces: bool
    """Whether spaces at both ends, and those after a space, are removed."""
    escape_spaces: bool

    def of(self, *types: int) -> list[str]:
        return [text for text, _, of in self.pieces if of in types]


def convert(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a model, with the same ids.

    Raises:
        ValueError: it is no SentencePiece model, or one that a tokenizer.json cannot represent.
    """
    model = _parsed(content)
    if model.kind not in (_UNIGRAM, _BPE):
        raise ValueError("it is a SentencePiece model of words or characters; only unigram and BPE can be converted")
    if model.space_as_suffix or model.of(_UNUSED):
        what = "spaces as suffixes" if model.space_as_suffix else "unused pieces"
        raise ValueError(f"it is a SentencePiece model with {what}, which a tokenizer.json cannot represent")
    if model.dummy_prefix and (own := model.of(_USER_DEFINED)):
        # What follows such a symbol would get a space of its own.
        raise ValueError(
            f"it is a SentencePiece model that puts a space before a text and has symbols of its own ({own[0]}), which "
            "a tokenizer.json cannot represent"
        )
    unknown = next((i for i, (_, _, of) in enumerate(model.pieces) if of == _UNKNOWN), None)
    if unknown is None:
        raise ValueError("it is a SentencePiece model without a piece for what is unknown")
    result = tokenizers.Tokenizer(_unigram(model, unknown) if model.kind == _UNIGRAM else _bpe(model, unknown))
    result.normalizer = normalizers.Sequence(_normalizers(model))
    if model.kind == _UNIGRAM and (guard := _guard(model)) is not None:
        result.pre_tokenizer = guard
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if model.dummy_prefix else steps)
    for text, _, of in model.pieces:
        if of in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            result.add_tokens([AddedToken(text, normalized=False, special=of != _USER_DEFINED)])
    return result


def _unigram(model: _Model, unknown: int) -> models.Model:
    vocabulary = [(text, score) for text, score, _ in model.pieces]
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback)


def _bpe(model: _Model, unknown: int) -> models.Model:
    """The pair that makes the piece with the highest score is merged first."""
    score_of = {text: (-score, i) for i, (text, score, of) in enumerate(model.pieces) if of in (_NORMAL, _USER_DEFINED)}
    merges = []
    for text in sorted(score_of, key=lambda text: score_of[text]):
        for cut in range(1, len(text)):
            if text[:cut] in score_of and text[cut:] in score_of:
                merges.append((text[:cut], text[cut:]))
    return models.BPE(
        {text: i for i, (text, _, _) in enumerate(model.pieces)},
        merges,
        unk_token=model.pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _normalizers(model: _Model) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE if model.escape_spaces else " "))
    if model.escape_spaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return steps


def _guard(model: _Model) -> Any:
    """Splits text that reads like a control symbol or byte piece after its first character, since the vocabulary of a
    Unigram model has these too, and SentencePiece never finds them in text."""
    texts = model.of(_CONTROL, _UNKNOWN, _BYTE)
    alternatives = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts if len(text) > 1)
    return pre_tokenizers.Split(Regex(alternatives), "merged_with_previous") if alternatives else None


def _parsed(content: bytes) -> _Model:
    try:
        message = _fields(content)
        pieces = []
        for piece in message.get(1, []):
            part = _fields(piece)
            score = struct.unpack("<f", part[2][-1])[0] if 2 in part else 0.0
            pieces.append((part[1][-1].decode(), score, part.get(3, [_NORMAL])[-1]))
        trainer, normalizer = (_fields(message.get(number, [b""])[-1]) for number in (2, 3))
    except (IndexError, KeyError, AttributeError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError("it is no SentencePiece model") from error
    if not pieces:
        raise ValueError("it is no SentencePiece model: it has no pieces")
    return _Model(
        pieces,
        kind=trainer.get(3, [_UNIGRAM])[-1],
        byte_fallback=bool(trainer.get(35, [0])[-1]),
        space_as_suffix=bool(trainer.get(24, [0])[-1]),
        charsmap=normalizer.get(2, [b""])[-1],
        dummy_prefix=bool(normalizer.get(3, [1])[-1]),
        remove_spaces=bool(normalizer.get(4, [1])[-1]),
        escape_spaces=bool(normalizer.get(5, [1])[-1]),
    )


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The values of a message by field number: integers as such, anything else as bytes. Raises IndexError or TypeError
    where it is none."""
    found: dict[int, list[Any]] = {}
    for number, value in _pairs(message):
        found.setdefault(number, []).append(value)
    return found


def _pairs(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise TypeError(wire)
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if at + size > len(message):
            raise IndexError(at + size)
        yield number, message[at : at + size]
        at += size
