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
    as Transformers' `save_pretrained` and `hf download` make it. A directory without tokenizer.json, and a file of
    SentencePiece or tiktoken, are converted, with the same ids, and a URL is copied, into the cache.

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
    return _converted_folder(path, setting)


def _converted_folder(path: str, setting: str) -> str:
    """The tokenizer.json, in the cache, of a folder that has none but what Transformers converts to one."""
    from corpus.tokenizer_formats import transformers_folder

    files = transformers_folder.files_of(path)
    if not any(file.name not in COMPANIONS and file.name != "config.json" for file in files):
        raise ValueError(f"{setting} {path} has no {TOKENIZER}")
    try:
        contents = {file.name: file.read_bytes() for file in files}
    except OSError as error:
        raise ValueError(f"{setting} {path} cannot be read: {error.strerror} ({error.filename})") from error
    key = hashlib.sha256(repr([_CONVERSION, *((name, _digest(text)) for name, text in contents.items())]).encode())
    folder = Path(ROOT).expanduser() / "tokenizers" / key.hexdigest()[:32]
    if not (folder / TOKENIZER).is_file():
        try:
            text = transformers_folder.convert(path).to_str().encode()
        except ValueError as error:
            # A model's own tokenizer may number the pieces differently from SentencePiece, and have more of them.
            named = "tokenizer.model"
            other = f"; name {named} itself for the ids that SentencePiece gives" if named in contents else ""
            raise ValueError(f"{setting} {path} has no {TOKENIZER}, and {error}{other}") from error
        for name in COMPANIONS:
            if name in contents:
                _write(folder / name, contents[name], f"{setting} {path}")
        _write(folder / TOKENIZER, text, f"{setting} {path}")
    return str(folder / TOKENIZER)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(target: Path, content: bytes, what: str) -> None:
    """Writes a file of the cache as a whole or not at all."""
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        make_private(target.parent)
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(f"{what}: {target.parent} cannot be written to: {error.strerror}") from error


def _cached(path: str, setting: str) -> str:
    """The tokenizer.json of a file that is converted or a URL, in the cache."""

    def key() -> str:
        content = storage.read_bytes(path)
        return hashlib.sha256(content + bytes([_CONVERSION, path.endswith(CONVERTED)])).hexdigest()[:32]

    try:
        name = answer("tokenizer", path, key) if storage.is_url(path) else key()
        folder = Path(ROOT).expanduser() / "tokenizers" / name
        content = None if (folder / TOKENIZER).is_file() else storage.read_bytes(path)
    except OSError as error:
        raise ValueError(f"{setting} {path} cannot be read: {error.strerror}") from error
    if content is not None:
        text = _converted(content, f"{setting} {path}") if path.endswith(CONVERTED) else content
        _write(folder / TOKENIZER, text, f"{setting} {path}")
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
