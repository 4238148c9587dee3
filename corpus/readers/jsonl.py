"""Rows of JSON: one per line, or the entries of one array in a .json file."""

import json
from collections.abc import Iterator
from typing import Any

from corpus.readers.compression import BYTE_ORDER_MARK, Damaged, lines, without_mark
from corpus.readers.rows import BadRow, Document, Row, decode, document_of, kind_of


def read_lines(path: str) -> Iterator[Row]:
    """The rows of a file with an object per line."""
    return (_row(line, number, done) for line, number, done in _numbered(path))


def read_line_documents(path: str, text_key: str) -> Iterator[Document | BadRow]:
    """What `documents_of` makes of `read_lines`, without a row for lines that are as expected."""
    for line, number, done in _numbered(path):
        try:
            text = json.loads(line.decode())[text_key]
            text.encode()  # fails with half a surrogate pair, and for what is no string
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            yield document_of(_row(line, number, done), text_key)
        else:
            yield Document(text, 0, done)


def _numbered(path: str) -> Iterator[tuple[bytes, int, float]]:
    """The lines that are not empty, their numbers, and the fraction of the file read so far."""
    number = 0
    try:
        for number, (line, done) in enumerate(lines(path), start=1):
            # Also of the first line of another file that was appended.
            if number == 1 or line.startswith(BYTE_ORDER_MARK):
                line = without_mark(line, path)
            if line.strip():
                yield line, number, done
    except Damaged as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def read_json(path: str) -> Iterator[Row]:
    """The rows of a .json file: an array of objects, which is read as a whole, or an object per line."""
    if not _begins_with_bracket(path):
        yield from read_lines(path)
        return
    try:
        content = b"\n".join(line for line, _ in lines(path))
    except Damaged as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    text, replaced = decode(without_mark(content, path))
    try:
        entries = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}; "
            "a file with an object per line has the suffix .jsonl"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    for number, entry in enumerate(entries, start=1):
        # How many of the replaced sequences an entry has is not known.
        yield _object(entry, f"entry {number}", number / len(entries), replaced if number == 1 else 0)


def _begins_with_bracket(path: str) -> bool:
    try:
        beginnings = (without_mark(line, path).lstrip() for line, _ in lines(path))
        return next((line for line in beginnings if line), b"").startswith(b"[")
    except Damaged:
        return False  # reported where the lines are read


def _row(line: bytes, number: int, done: float) -> Row:
    (text, replaced), where = decode(line), f"line {number}"
    try:
        return _object(_parse(text), where, done, replaced)
    except json.JSONDecodeError as error:
        return Row(where, BadRow(where, f" is not valid JSON: {error.msg}, column {error.colno}"), done)
    except RecursionError:
        return Row(where, BadRow(where, " is nested too deeply"), done)


def _object(value: Any, where: str, done: float, replaced: int) -> Row:
    if isinstance(value, dict):
        return Row(where, value, done, replaced)
    return Row(where, BadRow(where, f" is a JSON {kind_of(value)}, not an object"), done)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer with more digits than Python converts, in a field that is not used
        return json.loads(line, parse_int=float)
