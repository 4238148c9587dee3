"""Files of tiktoken's ranks (.tiktoken): a token in Base64 and its rank per line.

The pattern that splits a text, and the special tokens, are not in the file: they are those of the published encoding
that has as many ranks.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True)
class Encoding:
    """What a file of ranks does not say."""

    name: str
    ranks: int
    pattern: str
    special: dict[str, int]
    """Special tokens and their ids."""


def _numbered(first: int, *tokens: str) -> dict[str, int]:
    return {token: first + i for i, token in enumerate(tokens)}


ENCODINGS = (
    Encoding("r50k_base (GPT-2)", 50256, _GPT2, {"<|endoftext|>": 50256}),
    Encoding("p50k_base", 50280, _GPT2, {"<|endoftext|>": 50256}),
    Encoding(
        "cl100k_base (GPT-4)",
        100256,
        _GPT4,
        _numbered(100257, "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
        | {"<|endofprompt|>": 100276},
    ),
    Encoding(
        "Llama 3",
        128000,
        _GPT4,
        _numbered(
            128000,
            "<|begin_of_text|>",
            "<|end_of_text|>",
            *(f"<|reserved_special_token_{i}|>" for i in range(4)),
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|reserved_special_token_4|>",
            "<|eot_id|>",
            *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
        ),
    ),
    Encoding(
        "Qwen",
        151643,
        _QWEN,
        _numbered(151643, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    ),
    Encoding("o200k_base (GPT-4o)", 199998, _GPT4O, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
)
_BY_RANKS = {encoding.ranks: encoding for encoding in ENCODINGS}


def convert(content: bytes, encoding: Encoding | None = None) -> tokenizers.Tokenizer:
    """The tokenizer of a file, with the same ids.

    Args:
        encoding: None: the published one with as many ranks.

    Raises:
        ValueError: it has no ranks, or is of none of ENCODINGS.
    """
    ranks = _ranks(content)
    encoding = encoding or _BY_RANKS.get(len(ranks))
    if encoding is None:
        known = ", ".join(f"{encoding.name} {encoding.ranks:,}" for encoding in ENCODINGS)
        raise ValueError(
            f"it has {len(ranks):,} ranks of tiktoken, and how text is split is known of these only: {known}; "
            "save the tokenizer as a tokenizer.json"
        )
    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known_pairs = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(names[a], names[b]) for _, _, a, b in sorted(known_pairs)]
    _fill(vocabulary, encoding)
    # A part of a text that is a token is that token, by whichever merges.
    result = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    result.pre_tokenizer = _splitting(encoding.pattern)
    result.decoder = decoders.ByteLevel()
    for token in sorted(encoding.special, key=lambda token: encoding.special[token]):
        result.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    return result


def _fill(vocabulary: dict[str, int], encoding: Encoding) -> None:
    """Adds the special tokens, and names for the ids that no token has."""
    vocabulary |= encoding.special
    taken = set(vocabulary.values())
    vocabulary |= {f"<|unused_{i}|>": i for i in range(max(taken)) if i not in taken}


def _splitting(pattern: str) -> Any:
    if pattern == _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _ranks(content: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a token in Base64 and its rank") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"it has no rank of {len(missing)} of the 256 bytes, such as {missing[0]}")
    return ranks


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it is printable in Latin-1, or else
    one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
