"""Small files of a run directory: written whole, and read whatever a kill or a full disk has left of them. Imports
nothing heavy: the batch script reads them too."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

METRICS, EXPERT_LOAD = "metrics.jsonl", "expert_load.jsonl"


def write_whole(path: Path, content: bytes) -> None:
    """Written aside and renamed: a reader never sees half of it, nor a mixture of two writers."""
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        aside.write_bytes(content)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """None: it is torn, or other JSON than an object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. Other lines are passed over; a file that cannot be read has none.

    Args:
        last_bytes: only the end of the file is read.
    """
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [row for row in map(json_object, lines) if row is not None]
