"""Reads the rows of .jsonl and .parquet files as dictionaries."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from corpus.documents import _decode, _lines, _parse, _without_mark

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Row:
    where: str
    """Its position in the file, for messages."""
    value: Any
    """A dictionary, unless the file has something else there. A string: what is wrong with a line that is not JSON."""
    done: float
    """Fraction of the file read so far."""


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a file in order, of which at most one (.jsonl) or a few hundred (.parquet) are in memory.

    Raises:
        ValueError: the file cannot be read, is damaged, or has another suffix.
    """
    if not path.endswith(ROW_SUFFIXES):
        raise ValueError(f"{path}: rows are read from {' '.join(ROW_SUFFIXES)} files")
    try:
        yield from _read_parquet(path) if path.endswith(".parquet") else _read_jsonl(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: str) -> Iterator[Row]:
    import zstandard

    number = 0
    try:
        for number, (line, done) in enumerate(_lines(path), start=1):
            if number == 1:
                line = _without_mark(line, path)
            if line.strip():
                yield Row(f"line {number}", _json(line), done)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def _json(line: bytes) -> Any:
    try:
        return _parse(_decode(line)[0])
    except json.JSONDecodeError as error:
        return f"is not valid JSON: {error.msg}, column {error.colno}"
    except RecursionError:
        return "is nested too deeply"


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value, number / file.metadata.num_rows)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {number}: {error}") from error
