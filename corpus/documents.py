"""Reads text files as a stream of documents: a .txt file, or a row of the other formats, is one document."""

import difflib
import glob
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ROW_SUFFIXES = TEXT_SUFFIXES[1:]
"""Of files whose documents are rows with fields."""
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_BLOCK = 256 * 1024
_MAX_ZSTD_WINDOW = 2**31  # bytes, as of `zstd --long=31`
_MAX_NAMED_ROWS = 3
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    text: str
    replaced: int
    """Number of invalid UTF-8 sequences that were replaced by U+FFFD in `text`."""
    done: float
    """Fraction of the file read so far."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, such as one without valid text."""

    where: str
    why: str


class Row(NamedTuple):
    where: str
    """Its position in the file, for messages."""
    value: dict[str, Any] | BadRow
    """Its fields."""
    done: float
    """Fraction of the file read so far."""


@dataclass
class SkippedRows:
    """The rows of a file that were skipped because they cannot be used."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Positions and problems of the first ones."""

    def add(self, row: BadRow, path: str, *, strict: bool) -> None:
        """Counts a row. Raises ValueError with `strict`."""
        if strict:
            raise ValueError(f"{path} {row.where}{row.why}")
        self.count += 1
        if len(self.first) < _MAX_NAMED_ROWS:
            self.first.append(f"{row.where}{row.why}")

    def check_usable(self, path: str) -> None:
        """Called if a file has no other rows. Raises ValueError."""
        if self.count:
            others = f"; none of its {self.count} rows can be used" if self.count > 1 else ""
            raise ValueError(f"{path} {self.first[0]}{others}")

    def note(self, path: str) -> str:
        """The message for the user."""
        more = self.count - len(self.first)
        rows = "; ".join(self.first) + (f"; and {more} more" if more else "")
        return f"{path}: {self.count} row{'s' if self.count > 1 else ''} skipped (an error with strict=true): {rows}"


def is_text_file(path: str) -> bool:
    """Whether the suffix is one of TEXT_SUFFIXES."""
    return path.endswith(TEXT_SUFFIXES)


def has_rows(path: str) -> bool:
    """Whether the suffix is one of ROW_SUFFIXES."""
    return path.endswith(ROW_SUFFIXES)


def standard_library_files() -> list[str]:
    """Absolute paths of the source files of the running Python's standard library, without its tests, sorted.

    Raises:
        ValueError: this Python is installed without sources.
    """
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"data=stdlib: {root} contains no .py files; use data=text data.files=[...]")
    return sorted(files)


def expand(patterns: list[str]) -> list[str]:
    """Absolute paths of the text files that match paths and globs, without duplicates, sorted within each glob.

    Raises:
        ValueError: no such file, an empty or unreadable file, or a suffix that is not one of TEXT_SUFFIXES.
    """
    paths = []
    for pattern in map(os.path.expanduser, patterns):
        # A file may itself be called `a[1].txt`: an existing path is not a glob.
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise ValueError(f"{pattern} {what}{nearest_existing(pattern)}")
        paths += map(os.path.abspath, matches)
    for path in paths:
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder; name its files, for example {path}/*.txt")
        if not is_text_file(path):
            raise ValueError(f"{path}: unknown file format; supported are {' '.join(TEXT_SUFFIXES)}")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read by this user")
    return list(dict.fromkeys(paths))


def nearest_existing(path: str) -> str:
    """The end of a message about a missing file: the most similar name in its directory, or the missing directory."""
    try:
        os.stat(path)  # exists, but is not a file; or the name is invalid
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        return f": {error.strerror.lower() if isinstance(error, OSError) and error.strerror else error}"
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        while not folder.parent.is_dir():
            folder = folder.parent
        return f"; there is no {folder.name} in {folder.parent}"
    try:
        similar = difflib.get_close_matches(Path(path).name, os.listdir(folder), n=1, cutoff=0.5)
    except OSError:
        return ""  # a directory that this user cannot list
    return f"; did you mean {folder / similar[0]}?" if similar else ""


def read_documents(
    path: str, text_key: str, *, strict: bool = False, skipped: SkippedRows | None = None
) -> Iterator[Document]:
    """The documents of a file, in order, without empty ones. At most one document (.txt, .jsonl) or one row group
    (.parquet) is in memory.

    Args:
        path: one of TEXT_SUFFIXES; any other suffix is read like .txt.
        text_key: the field of a row that has its text.
        strict: raise an error for a row that is not JSON, has no such field, or whose field is not a string.
        skipped: counts such rows otherwise.

    Raises:
        ValueError: the file cannot be read or is damaged, or no row (with `strict`: not every row) has text; the
            message names the file and the line.
    """
    if path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        rows = _read_jsonl(path, text_key)
    elif path.endswith(".parquet"):
        rows = _read_parquet(path, text_key)
    else:
        rows = _read_plain(path)
    skipped = SkippedRows() if skipped is None else skipped
    usable = False
    try:
        for row in rows:
            if isinstance(row, Document):
                usable = True
                if row.text:
                    yield row
                continue
            skipped.add(row, path, strict=strict)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not usable:
        skipped.check_usable(path)


def _read_plain(path: str) -> Iterator[Document]:
    yield Document(*_decode(_without_mark(Path(path).read_bytes(), path)), done=1.0)


def _without_mark(start: bytes, path: str) -> bytes:
    """The beginning of a file without its byte-order mark.

    Raises:
        ValueError: the byte-order mark of UTF-16.
    """
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in start:
        raise ValueError(f"{path} is in UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    return start.removeprefix(_BYTE_ORDER_MARK)


def _read_jsonl(path: str, text_key: str) -> Iterator[Document | BadRow]:
    for where, row, replaced, done in _json_rows(path):
        value = row if isinstance(row, BadRow) else _field(row, text_key, where)
        yield Document(value, replaced, done) if isinstance(value, str) else value


def _json_rows(path: str) -> Iterator[tuple[str, Any, int, float]]:
    """Of each line: its name, the JSON value or a BadRow, how many invalid UTF-8 sequences were replaced, and the
    fraction of the file read so far."""
    import zstandard

    number = 0
    try:
        for number, (line, done) in enumerate(_lines(path), start=1):
            if number == 1:
                line = _without_mark(line, path)
            if line.strip():
                text, replaced = _decode(line)
                yield f"line {number}", _parsed(text, f"line {number}"), replaced, done
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def _parsed(line: str, where: str) -> Any:
    try:
        return _parse(line)
    except json.JSONDecodeError as error:
        return BadRow(where, f" is not valid JSON: {error.msg}, column {error.colno}")
    except RecursionError:
        return BadRow(where, " is nested too deeply")


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file as objects, of which nothing is required.

    Raises:
        ValueError: another kind of file, or one that cannot be read or is damaged.
    """
    try:
        if path.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.endswith(ROW_SUFFIXES):
            for where, row, _, done in _json_rows(path):
                if not isinstance(row, (dict, BadRow)):
                    row = BadRow(where, f" is a JSON {_kind(row)}, not an object")
                yield Row(where, row, done)
        else:
            raise ValueError(f"{path} has no rows; supported are {' '.join(ROW_SUFFIXES)}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", row, number / file.metadata.num_rows)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {number}: {error}") from error


def _field(row: Any, text_key: str, where: str) -> str | BadRow:
    """The text of a JSON row."""
    if not isinstance(row, dict):
        return BadRow(where, f" is a JSON {_kind(row)}, not an object with a field {text_key!r}")
    if text_key not in row:
        names = ", ".join(row) or "none"
        return BadRow(where, f" has no field {text_key!r}; set text_key to one that it has: {names}")
    value = row[text_key]
    if not isinstance(value, str):
        return BadRow(where, f": field {text_key!r} is {_kind(value)}, not a string")
    return _without_lone_surrogates(value)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer with more digits than Python converts, in a field that is not used
        return json.loads(line, parse_int=float)


def _read_parquet(path: str, text_key: str) -> Iterator[Document | BadRow]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        if text_key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path} has no column {text_key!r}; set text_key to one that it has: {names}")
        for batch in file.iter_batches(batch_size=256, columns=[text_key]):
            # As bytes, since Arrow does not validate UTF-8.
            for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                number += 1
                if value is None:
                    yield BadRow(f"row {number}", f": column {text_key!r} is null")
                else:
                    yield Document(*_decode(value), done=number / file.metadata.num_rows)
    except arrow.ArrowNotImplementedError as error:
        raise ValueError(f"{path}: column {text_key!r} does not hold text: {error}") from error
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged after row {number}: {error}") from error


def _decode(data: bytes) -> tuple[str, int]:
    """Text of UTF-8 bytes, and the number of invalid sequences replaced by U+FFFD."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def _without_lone_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON can escape but UTF-8 cannot encode, by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(path: str) -> Iterator[tuple[bytes, float]]:
    """Lines of a plain or compressed file, without their newline, and the fraction of the file read so far."""
    if path.endswith(".gz"):
        blocks = _decompressed(path, partial(zlib.decompressobj, wbits=31))
    elif path.endswith(".zst"):
        import zstandard

        blocks = _decompressed(path, zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj)
    else:
        blocks = _blocks(path)
    begun: list[bytes] = []  # parts of an incomplete line, joined once so that long lines take linear time
    for block, done in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            *lines, rest = b"".join(begun), *others
            for line in lines:
                yield line, done
            begun = [rest]
    if line := b"".join(begun):
        yield line, 1.0


def _blocks(path: str) -> Iterator[tuple[bytes, float]]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block, file.tell() / size


def _decompressed(path: str, new_frame: Callable[[], Any]) -> Iterator[tuple[bytes, float]]:
    """The decompressed content of the concatenated frames (zstd) or members (gzip) of a file.

    Raises:
        EOFError: the last one is truncated.
        zlib.error, zstandard.ZstdError: one is damaged.
    """
    frame = None
    for block, done in _blocks(path):
        while block:
            frame = frame or new_frame()
            yield frame.decompress(block), done
            block = frame.unused_data.lstrip(b"\0") if frame.eof else b""  # some files are padded with zeros
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle of the compressed data")
