"""A folder of token shards with a manifest, as launch.prepare writes it at scale: many pairs, one data set."""

import json
import os
from pathlib import Path
from typing import Any

from corpus.integrity import sha256

FORMAT = 1
MANIFEST, SUMMARY, TOKENIZER = "manifest.json", "summary.json", "tokenizer.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        ValueError: there is none, or it is not of this kind.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
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


def shard_prefixes(folder: str) -> list[str]:
    """The prefixes of a folder's shards, in the order of their documents.

    Raises:
        ValueError: a file of the manifest is missing or has another size.
    """
    prefixes = []
    for shard in read_manifest(folder)["shards"]:
        prefix = os.path.join(folder, shard["name"])
        for suffix in ("bin", "idx"):
            path, expected = f"{prefix}.{suffix}", shard[suffix]["bytes"]
            found = os.path.getsize(path) if os.path.exists(path) else None
            if found != expected:
                state = "does not exist" if found is None else f"has {found} bytes"
                raise ValueError(f"{path} {state}, but {MANIFEST} says {expected} bytes; prepare the data again")
        prefixes.append(prefix)
    return prefixes


def check_tokenizer(folder: str, tokenizer: str) -> None:
    """Raises ValueError if a folder's tokens were made with another tokenizer."""
    made = read_manifest(folder)["tokenizer"]
    if os.path.isfile(tokenizer) and sha256(tokenizer) != made["sha256"]:
        raise ValueError(
            f"{folder} was made with another tokenizer than data.tokenizer={tokenizer}; set "
            f"data.tokenizer={os.path.join(folder, made['file'])}"
        )
