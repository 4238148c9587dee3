"""The tokenizer: any Hugging Face tokenizer.json, or a byte-level BPE trained on the data."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from corpus.documents import nearest_existing

if TYPE_CHECKING:
    import numpy as np

_SEGMENT = 256 * 1024  # characters
_BEFORE_SPACE = re.compile(r"(?<=\S)(?= \S)")
_BEFORE_SPACE_OR_LINE = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
# The patterns of GPT-4 (cl100k_base), also used by Llama 3, and of Qwen. Like GPT-2's, they end a token before a single
# space and after a single newline.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_SPLITS = {f"{_CONTRACTIONS}|{_WORDS}|{numbers}|{_OTHERS}" for numbers in (r"\p{N}{1,3}", r"\p{N}")}


class Tokenizer:
    """Text to token ids and back.

    Special tokens are not parsed in text: the end-of-document token in a document is encoded as ordinary characters. No
    tokens (such as a beginning-of-sentence token) are added.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eod_id: int | None) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self._special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        self._parsing: tokenizers.Tokenizer | None = None  # a copy that parses special tokens, made when needed
        self._split_pattern = _safe_split_pattern(json.loads(inner.to_str()))
        self.eod_id = eod_id
        """Id of the end-of-document token."""
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """Largest id plus one."""

    @classmethod
    def load(cls, path: str, eod_token: str | None) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            ValueError: the file does not exist, is not a tokenizer, or has no token `eod_token`.
        """
        try:
            with open(path, encoding="utf-8") as file:
                inner = tokenizers.Tokenizer.from_str(file.read())
        except FileNotFoundError:
            raise ValueError(f"tokenizer {path} does not exist{nearest_existing(path)}") from None
        except OSError as error:
            raise ValueError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        eod_id = None if eod_token is None else inner.token_to_id(eod_token)
        if eod_token is not None and eod_id is None:
            raise ValueError(f"{path} has no token {eod_token!r}; {_eod_candidates(inner)}")
        return cls(inner, eod_id)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, eod_token: str) -> "Tokenizer":
        """Trains a byte-level BPE (as GPT-2's) of at most `vocab_size` tokens, including the end-of-document token. All
        256 bytes are tokens, so that every text can be encoded.

        Raises:
            ValueError: `vocab_size` is too small for the bytes.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 1:
            raise ValueError(
                f"vocab_size={vocab_size} is too small to train a byte-level tokenizer: "
                f"set it to {len(alphabet) + 1} or more (256 bytes and the end-of-document token)"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[eod_token], initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, inner.token_to_id(eod_token))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._inner.to_str(), self.eod_id)

    def save(self, path: str) -> None:
        """Writes a tokenizer.json."""
        self._inner.save(path)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_pieces(
        self, texts: list[str], last: Sequence[bool], dtype: "np.dtype"
    ) -> "tuple[np.ndarray, np.ndarray]":
        """The token ids of some texts, one after the other, each with an end-of-document token where `last` is set; and
        the number of tokens of each text, int64. On all cores."""
        import numpy as np

        ids = self.encode_batch(texts)
        for of_text, is_last in zip(ids, last, strict=True):
            if is_last:
                of_text.append(self.eod_id)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum())), lengths

    def encode_with_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text in which special tokens are parsed, such as a rendered chat template, and the first
        character and end of each token in the text."""
        if self._parsing is None:
            self._parsing = tokenizers.Tokenizer.from_str(self._inner.to_str())
            self._parsing.encode_special_tokens = False
        encoding = self._parsing.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def is_special(self, i: int) -> bool:
        """Whether an id is that of a special token."""
        return i in self._special

    def segments(self, text: str) -> list[str]:
        """Splits a long text every _SEGMENT characters or slightly more, at positions that do not change the tokens, so
        that it can be encoded on all cores and in little memory. Returns it whole if no such positions are known for
        this tokenizer."""
        if self._split_pattern is None:
            return [text]
        parts, start = [], 0
        while cut := self._split_pattern.search(text, start + _SEGMENT):
            parts.append(text[start : cut.start()])
            start = cut.start()
        return [*parts, text[start:]]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, including special tokens."""
        return self._inner.decode(ids, skip_special_tokens=False)

    def token(self, i: int) -> str | None:
        """The token of an id, as in the vocabulary. None: there is none."""
        return self._inner.id_to_token(i)

    def byte_lengths(self) -> "np.ndarray":
        """Number of UTF-8 bytes of each token, int32 [V]; 0 for special tokens and unused ids.

        Exact for byte-level tokenizers: the lengths of a text's tokens add up to the bytes of the text. For others, the
        bytes that a token adds to decoded text, which is exact if the tokenizer is lossless.
        """
        import numpy as np

        added = self._inner.get_added_tokens_decoder()
        state = json.loads(self._inner.to_str())
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        ordinary = sorted(set(self._inner.get_vocab(with_added_tokens=True).values()) - set(added))
        if '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]]):
            # Each character of a byte-level token represents one byte.
            lengths[ordinary] = [len(self._inner.id_to_token(i)) for i in ordinary]
        else:
            lengths[ordinary] = self._decoded_lengths(ordinary)
        for i, token in added.items():
            lengths[i] = 0 if token.special or i == self.eod_id else len(token.content.encode())
        return lengths

    def _decoded_lengths(self, ids: list[int]) -> list[int]:
        """Bytes that each token adds to the text of a preceding token, since the first token of a text may lose a
        space."""
        decode_batch = self._inner.decode_batch
        before = ids[-1]
        alone = len(decode_batch([[before]])[0].encode())
        lengths = []
        for i, text in zip(ids, decode_batch([[before, i] for i in ids]), strict=True):
            one_byte = re.fullmatch("<0x[0-9A-F]{2}>", self._inner.id_to_token(i))
            lengths.append(1 if one_byte else len(text.encode()) - alone)
        return lengths


def _unpickled(state: str, eod_id: int | None) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(state), eod_id)


def _safe_split_pattern(state: dict[str, Any]) -> re.Pattern[str] | None:
    """Positions at which a text can be split without changing its tokens. None: no such positions are known.

    Pre-tokenizers end a token at certain characters regardless of what follows. But those that insert a space before a
    text would insert one before every part that does not begin with one, and an added token may span the split.

    Args:
        state: content of the tokenizer.json.
    """
    normalizer, pre_tokenizer = state["normalizer"], state["pre_tokenizer"] or {}
    if normalizer is not None and normalizer["type"] != "NFC":  # spaces and newlines do not compose
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    kinds = [part.get("type") for part in parts]
    if kinds == ["Metaspace"]:
        cut = _BEFORE_SPACE if parts[0].get("split", True) else None
    elif kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        cut = _BEFORE_SPACE if parts[0]["add_prefix_space"] else _BEFORE_SPACE_OR_LINE
    elif kinds == ["Split", "ByteLevel"] and _is_known_split(parts[0]) and not parts[1].get("use_regex", True):
        cut = None if parts[1]["add_prefix_space"] else _BEFORE_SPACE_OR_LINE
    else:
        cut = None
    for token in state["added_tokens"]:
        # Special tokens are not parsed in text.
        if not token["special"] and (token["lstrip"] or token["rstrip"] or re.search(r"\s\S|\S\s", token["content"])):
            return None
    return cut


def _is_known_split(part: dict[str, Any]) -> bool:
    return part["pattern"].get("Regex") in _KNOWN_SPLITS and part["behavior"] == "Isolated" and not part["invert"]


def _eod_candidates(inner: tokenizers.Tokenizer) -> str:
    """The end of the message about a missing end-of-document token."""
    special = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
    likely = [token for token in special if re.search(r"end|eo[dst]|</s>|\[SEP\]", token, re.IGNORECASE)]
    shown = ", ".join((likely or special)[:5])
    return f"set eod_token to one that it has: {shown}" if shown else "it has no special token to end documents with"
