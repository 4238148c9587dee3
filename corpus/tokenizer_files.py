"""The files of a Hugging Face tokenizer: the tokenizer.json that is read, and those that belong beside it."""

import os
from pathlib import Path

from corpus.documents import nearest_existing

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)
"""Files that say how the tokenizer of a directory is used: special tokens, chat template. Training does not read them;
a run keeps them in COMPANION_DIR, and an export writes them beside the weights."""
COMPANION_DIR = "tokenizer"


def tokenizer_json(given: str, setting: str) -> str:
    """Absolute path of the tokenizer.json that a setting names: the file itself, or a directory of a tokenizer or model
    as Transformers' `save_pretrained` and `hf download` make it.

    Raises:
        ValueError: neither is there; the message says `setting`.
    """
    path = os.path.abspath(os.path.expanduser(given))
    if not os.path.isdir(path):
        try:
            os.stat(path)
        except FileNotFoundError:
            raise ValueError(f"{setting} {path} does not exist{nearest_existing(path)}") from None
        except OSError as error:
            raise ValueError(f"{setting} {path} cannot be read: {error.strerror}") from None
        return path
    if os.path.isfile(inside := os.path.join(path, TOKENIZER)):
        return inside
    convert = (
        "convert it with Transformers: "
        f"AutoTokenizer.from_pretrained({path!r}).save_pretrained(NEW) writes {TOKENIZER} into NEW"
    )
    slow = next((name for name in ("tokenizer.model", "vocab.json") if os.path.isfile(os.path.join(path, name))), None)
    raise ValueError(f"{setting} {path} has no {TOKENIZER}" + (f", only {slow}: {convert}" if slow else ""))


def companions(tokenizer: str | Path) -> list[Path]:
    """The COMPANIONS of a tokenizer.json: in its directory, or where a run keeps them. None of a file with another
    name, whose neighbours may belong to another tokenizer."""
    path = Path(tokenizer)
    if path.name != TOKENIZER:
        return []
    folders = (path.parent / COMPANION_DIR, path.parent)
    found = [next((f / name for f in folders if (f / name).is_file()), None) for name in COMPANIONS]
    return [file for file in found if file is not None]
