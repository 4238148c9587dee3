"""A folder of token shards with a manifest, as launch.prepare writes it at scale: many pairs, one data set."""

import json
import os
from pathlib import Path
from typing import Any

from corpus import storage
from corpus.answers import answer
from corpus.integrity import sha256

FORMAT = 1
MANIFEST, SUMMARY, TOKENIZER = "manifest.json", "summary.json", "tokenizer.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        ValueError: there is none, or it is not of this kind.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        content = answer("content", path, lambda: storage.read_bytes(path).decode()) if storage.is_url(path) else None
        manifest = json.loads(Path(path).read_bytes() if content is None else content)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is a folder without {MANIFEST}; name the prefixes of its .bin/.idx pairs, or a folder that "
            "launch.prepare wrote with executor="
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "shards" not in manifest:
        raise ValueError(f"{path} is not the manifest of token shards")
    return manifest


def is_folder(path: str) -> bool:
    """Whether a path or URL names a folder. Raises ValueError if it cannot be found out."""
    try:
        found = storage.find(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return found is not None and found.is_folder


def shard_prefixes(folder: str) -> list[str]:
    """The prefixes of a folder's shards, in the order of their documents.

    Raises:
        ValueError: a file of the manifest is missing or has another size.
    """
    shards = read_manifest(folder)["shards"]
    expected = {
        os.path.join(folder, f"{shard['name']}.{suffix}"): shard[suffix]["bytes"]
        for shard in shards
        for suffix in ("bin", "idx")
    }
    try:
        files = storage.each(storage.find, list(expected))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror or error}") from error
    for (path, size), found in zip(expected.items(), files, strict=True):
        if found is None or found.size != size:
            state = "does not exist" if found is None else f"has {found.size} bytes"
            raise ValueError(f"{path} {state}, but {MANIFEST} says {size} bytes; prepare the data again")
    return [os.path.join(folder, shard["name"]) for shard in shards]


def check_tokenizer(folder: str, tokenizer: str) -> None:
    """Raises ValueError if a folder's tokens were made with another tokenizer."""
    made = read_manifest(folder)["tokenizer"]
    if os.path.isfile(tokenizer) and sha256(tokenizer) != made["sha256"]:
        raise ValueError(
            f"{folder} was made with another tokenizer than data.tokenizer={tokenizer}; set "
            f"data.tokenizer={os.path.join(folder, made['file'])}"
        )
