"""Atomic writes of small files in a run directory, and readers that tolerate truncated files. Does not import torch:
the batch script uses this module."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

METRICS, EXPERT_LOAD = "metrics.jsonl", "expert_load.jsonl"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically, through a temporary file that is renamed."""
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        aside.write_bytes(content)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """Parses a JSON object; None if it is invalid or not an object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line. Other lines are ignored; a file that cannot be read has none.

    Args:
        last_bytes: read only this many bytes at the end of the file.
    """
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [row for row in map(json_object, lines) if row is not None]
