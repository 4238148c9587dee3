"""What the readers return: documents, rows with fields, and those that cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_MAX_NAMED_ROWS = 3


@dataclass(frozen=True)
class Document:
    text: str
    replaced: int
    """Number of invalid UTF-8 sequences, and halves of surrogate pairs, that were replaced by U+FFFD in `text`."""
    done: float
    """Fraction of the file read so far."""
    where: str = field(default="", kw_only=True)
    """Its position in the file, for messages about `replaced`; empty where the document is the file."""

    @property
    def language(self) -> str | None:
        """Of source code, by the name of its file."""
        return None


@dataclass(frozen=True)
class CodeDocument(Document):
    written_in: str | None

    @property
    def language(self) -> str | None:
        return self.written_in


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, such as one without valid text."""

    where: str
    why: str


class BadFile(ValueError):
    """A file of which nothing, or nothing further, can be used for what is in it: not because it cannot be read."""


class Row(NamedTuple):
    where: str
    """Its position in the file, for messages."""
    value: dict[str, Any] | BadRow
    """Its fields."""
    done: float
    """Fraction of the file read so far."""
    replaced: int = 0
    """Number of invalid UTF-8 sequences that were replaced by U+FFFD."""


@dataclass
class SkippedRows:
    """What was left out of a file because it cannot be used."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Positions and problems of the first ones."""
    rest: str = ""
    """Why all of the file, or what follows, was left out."""
    all_rows: bool = False
    """Whether that is because of all of its rows."""

    def __bool__(self) -> bool:
        return bool(self.count or self.rest)

    def add(self, row: BadRow, path: str, *, strict: bool) -> None:
        """Counts a row. Raises ValueError with `strict`."""
        if strict:
            raise ValueError(f"{path} {row.where}{row.why}")
        self.count += 1
        if len(self.first) < _MAX_NAMED_ROWS:
            self.first.append(f"{row.where}{row.why}")

    def check_usable(self, path: str) -> None:
        """Called if a file has no other rows. Raises BadFile."""
        if self.count:
            self.all_rows = True
            others = f"; none of its {self.count} rows can be used" if self.count > 1 else ""
            raise BadFile(f"{path} {self.first[0]}{others}")

    def note(self, path: str) -> str:
        """The message for the user."""
        rest = f"{self.rest}: left out (an error with strict=true)"
        if self.all_rows or not self.count:
            return rest
        more = self.count - len(self.first)
        rows = "; ".join(self.first) + (f"; and {more} more" if more else "")
        rows = f"{path}: {self.count} row{'s' if self.count > 1 else ''} skipped (an error with strict=true): {rows}"
        return f"{rows}; {rest}" if self.rest else rows


def documents_of(rows: Iterator[Row], text_key: str) -> Iterator[Document | BadRow]:
    """The text of each row.

    Args:
        text_key: as of `document_of`.
    """
    return (document_of(row, text_key) for row in rows)


def document_of(row: Row, text_key: str) -> Document | BadRow:
    """The text of a row.

    Args:
        text_key: a field, or `a.b`: field b of the object in field a. A list of strings is joined by newlines.
    """
    if isinstance(row.value, BadRow):
        return row.value
    text = _text(row.value, text_key, row.where)
    if not isinstance(text, str):
        return text
    text, lone = _without_lone_surrogates(text)
    return Document(text, row.replaced + lone, row.done, where=row.where)


def decode(data: bytes) -> tuple[str, int]:
    """Text of UTF-8 bytes, and the number of invalid sequences replaced by U+FFFD."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def replaced_note(path: str, count: int, where: str) -> str:
    """The message about invalid UTF-8 in a file.

    Args:
        where: the first document with some; empty: the file is one document.
    """
    first = f", the first in {where}" if where else ""
    return f"{count} invalid UTF-8 sequence{'s' if count > 1 else ''} replaced in {path}{first}"


def names_for_messages(fields: dict[str, Any]) -> str:
    """The fields that text_key can name, those of nested objects as `a.b`."""
    names = []
    for name, value in fields.items():
        names += [f"{name}.{inner}" for inner in value] if isinstance(value, dict) and value else [name]
    return ", ".join(names) or "none"


def no_field(text_key: str, fields: dict[str, Any]) -> str:
    """The end of the message about a row or table without the field."""
    return f"{text_key!r}; set text_key to one that it has: {names_for_messages(fields)}"


def _text(row: dict[str, Any], text_key: str, where: str) -> str | BadRow:
    value: Any = row
    for name in [text_key] if text_key in row else text_key.split("."):
        if not isinstance(value, dict) or name not in value:
            return BadRow(where, f" has no field {no_field(text_key, row)}")
        value = value[name]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        return BadRow(where, f": field {text_key!r} is {kind_of(value)}, not a string")
    return value


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _without_lone_surrogates(text: str) -> tuple[str, int]:
    """Replaces lone surrogates, which JSON can escape but UTF-8 cannot encode, by U+FFFD, and counts them."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError:
        found = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return found, found.count("\ufffd") - text.count("\ufffd")
