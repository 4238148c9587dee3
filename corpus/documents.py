"""Reads files of text as a stream of documents. The formats are in `corpus/readers`, the files in `corpus/paths.py`."""

import os
import sysconfig
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from corpus import storage
from corpus.paths import expand, nearest_existing
from corpus.readers.compression import Damaged
from corpus.readers.formats import described, format_of
from corpus.readers.plain import read_text
from corpus.readers.rows import BadFile, BadRow, Document, Row, SkippedRows

__all__ = [
    "BadFile",
    "BadRow",
    "Document",
    "Row",
    "SkippedRows",
    "expand",
    "has_rows",
    "is_text_file",
    "nearest_existing",
    "read_documents",
    "read_rows",
    "row_formats",
    "standard_library_files",
]

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def is_text_file(path: str) -> bool:
    """Whether the name is that of a file format."""
    return format_of(path) is not None


def has_rows(path: str) -> bool:
    """Whether the documents of the file are rows with fields."""
    entry = format_of(path)
    return entry is not None and entry.rows is not None


def row_formats() -> str:
    """The suffixes of files with rows, for messages."""
    return described(rows=True)


def standard_library_files() -> list[str]:
    """Absolute paths of the source files of the running Python's standard library, without its tests and empty ones,
    sorted.

    Raises:
        ValueError: this Python is installed without sources.
    """
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        found = [os.path.join(folder, name) for name in names if name.endswith(".py")]
        files += [path for path in found if os.path.getsize(path)]
    if not files:
        raise ValueError(f"data=stdlib: {root} contains no .py files; use data=text data.files=[...]")
    return sorted(files)


def read_documents(
    path: str, text_key: str, *, strict: bool = False, skipped: SkippedRows | None = None
) -> Iterator[Document]:
    """The documents of a file, in order, without empty ones. At most one document or one batch of rows (.parquet: one
    row group) is in memory; of a .json file that is one array, all of it.

    Args:
        path: of a file format (`corpus/readers/formats.py`); any other file is read like .txt. May be a URL.
        text_key: the field of a row that has its text; `a.b` is field b of the object in field a.
        strict: raise an error for a row that is not JSON, has no such field, or whose field is not text.
        skipped: counts such rows otherwise.

    Raises:
        BadFile: the file is damaged or empty, or no row has text; the message names the file and the line.
        ValueError: the file cannot be read, or with `strict` a row has no text.
    """
    entry = format_of(path)
    skipped = SkippedRows() if skipped is None else skipped
    usable = some = False
    with _explained(path):
        for row in read_text(path, text_key) if entry is None else entry.read(path, text_key):
            if isinstance(row, Document):
                usable = True
                if row.text:
                    some = True
                    yield row
                continue
            skipped.add(row, path, strict=strict)
        if not some and not skipped.count and not storage.size(path):
            raise BadFile(f"{path} is empty")
    if not usable and entry is not None and entry.rows is not None:  # else the file is one document of many
        skipped.check_usable(path)


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a file as objects, of which nothing is required.

    Raises:
        BadFile: the file is damaged.
        ValueError: it is of a format without rows, or cannot be read.
    """
    entry = format_of(path)
    if entry is None or entry.rows is None:
        raise ValueError(f"{path} has no rows; supported are {row_formats()}")
    with _explained(path):
        yield from entry.rows(path)


@contextmanager
def _explained(path: str) -> Generator[None]:
    """Tells a file whose content cannot be used, which others do not depend on, from one that could not be read now.

    Raises:
        BadFile: the former.
        ValueError: the latter.
    """
    try:
        yield
    except (BadFile, storage.NoFileSystem):
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Damaged as error:
        raise BadFile(f"{path} is damaged: {error}") from error
    except ValueError as error:
        raise BadFile(str(error)) from error
