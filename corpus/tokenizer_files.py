"""The files of a Hugging Face tokenizer: the tokenizer.json that is read, and those that belong beside it. Those of
SentencePiece and tiktoken are converted."""

import hashlib
import os
import uuid
from pathlib import Path

from corpus import storage
from corpus.answers import answer
from corpus.documents import nearest_existing
from parallel.cache_dir import ROOT, make_private

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)
"""Files that say how the tokenizer of a directory is used: special tokens, chat template. Training does not read them;
a run keeps them in COMPANION_DIR, and an export writes them beside the weights."""
COMPANION_DIR = "tokenizer"


CONVERTED = (".model", ".spm", ".tiktoken")
"""Suffixes of SentencePiece models and of tiktoken's ranks."""
_CONVERSION = 1
"""Incremented when a conversion changes."""


def tokenizer_json(given: str, setting: str) -> str:
    """Absolute path of the tokenizer.json that a setting names: the file itself, or a directory of a tokenizer or model
    as Transformers' `save_pretrained` and `hf download` make it. A file of SentencePiece or tiktoken is converted, with
    the same ids, and a URL copied, into the cache.

    Raises:
        ValueError: none of these is there, or it cannot be converted; the message says `setting`.
    """
    if storage.is_url(given):
        return _cached(given, setting)
    path = os.path.abspath(os.path.expanduser(given))
    if not os.path.isdir(path):
        try:
            os.stat(path)
        except FileNotFoundError:
            raise ValueError(f"{setting} {path} does not exist{nearest_existing(path)}") from None
        except OSError as error:
            raise ValueError(f"{setting} {path} cannot be read: {error.strerror}") from None
        return _cached(path, setting) if path.endswith(CONVERTED) else path
    if os.path.isfile(inside := os.path.join(path, TOKENIZER)):
        return inside
    convert = (
        "convert it with Transformers: "
        f"AutoTokenizer.from_pretrained({path!r}).save_pretrained(NEW) writes {TOKENIZER} into NEW"
    )
    slow = next((name for name in ("tokenizer.model", "vocab.json") if os.path.isfile(os.path.join(path, name))), None)
    if slow == "tokenizer.model":
        # A model's own tokenizer may number the pieces differently, and have more of them.
        convert += f"; or name {slow} itself, for the ids that SentencePiece gives"
    raise ValueError(f"{setting} {path} has no {TOKENIZER}" + (f", only {slow}: {convert}" if slow else ""))


def _cached(path: str, setting: str) -> str:
    """The tokenizer.json of a file that is converted or a URL, in the cache."""

    def key() -> str:
        content = storage.read_bytes(path)
        return hashlib.sha256(content + bytes([_CONVERSION, path.endswith(CONVERTED)])).hexdigest()[:32]

    try:
        name = answer("tokenizer", path, key) if storage.is_url(path) else key()
        folder = Path(ROOT).expanduser() / "tokenizers" / name
        content = b"" if (folder / TOKENIZER).is_file() else storage.read_bytes(path)
    except OSError as error:
        raise ValueError(f"{setting} {path} cannot be read: {error.strerror}") from error
    if content:
        text = _converted(content, f"{setting} {path}") if path.endswith(CONVERTED) else content
        partial = folder / f"{TOKENIZER}.{uuid.uuid4().hex}.partial"
        try:
            make_private(folder)
            partial.write_bytes(text)
            os.replace(partial, folder / TOKENIZER)
        except OSError as error:
            raise ValueError(f"{setting} {path}: {folder} cannot be written to: {error.strerror}") from error
    return str(folder / TOKENIZER)


def _converted(content: bytes, what: str) -> bytes:
    from corpus.tokenizer_formats import sentencepiece, tiktoken

    begin = content[: content.find(b"\n") + 1].split()
    is_ranks = len(begin) == 2 and begin[1].isdigit()
    try:
        return (tiktoken if is_ranks else sentencepiece).convert(content).to_str().encode()
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from error


def companions(tokenizer: str | Path) -> list[Path]:
    """The COMPANIONS of a tokenizer.json: in its directory, or where a run keeps them. None of a file with another
    name, whose neighbours may belong to another tokenizer."""
    path = Path(tokenizer)
    if path.name != TOKENIZER:
        return []
    folders = (path.parent / COMPANION_DIR, path.parent)
    found = [next((f / name for f in folders if (f / name).is_file()), None) for name in COMPANIONS]
    return [file for file in found if file is not None]
