"""Inspects files of text."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from corpus.conversations import conversation_of, message_text
from corpus.inspection.report import Problems, Progress, Report, size_text
from corpus.objects import sizes_of
from corpus.preferences import parse
from corpus.readers.compression import Damaged, blocks, without_mark
from corpus.readers.formats import format_of
from corpus.readers.plain import binary, read_text
from corpus.readers.rows import BadRow, Document, Row, decode, kind_of
from corpus.tokenizer import Tokenizer

SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 2000, 16 * 1024 * 1024
"""What is read unless all is asked for."""
_BATCH = 1000
"""Documents that are tokenised at once."""
_MOST_RESPONSES = 1 << 20


class _Samples:
    """Some of the documents, all equally likely, but the same in each run (reservoir sampling)."""

    def __init__(self, count: int) -> None:
        self._kept: list[tuple[int, str, str]] = []
        self._count, self._seen, self._random = count, 0, Random(0)

    def add(self, where: str, text: str) -> None:
        self._seen += 1
        place = len(self._kept) if len(self._kept) < self._count else self._random.randrange(self._seen)
        if place < self._count:
            self._kept[place : place + 1] = [(self._seen, where, text)]

    def in_order(self) -> list[tuple[str, str]]:
        """(where, text)."""
        return [(where, text) for _, where, text in sorted(self._kept)]


@dataclass
class _Found:
    """What reading text files brings together."""

    lengths: list[int] = field(default_factory=list)
    characters: int = 0
    samples: "_Samples" = field(default_factory=lambda: _Samples(0))
    languages: Counter[str] = field(default_factory=Counter)
    problems: Problems = field(default_factory=Problems)
    bytes_read: float = 0.0
    fields: str = ""


def inspect_text(
    files: Sequence[str],
    *,
    text_key: str,
    tokenizer: Tokenizer | None,
    full: bool,
    samples: int,
    progress: Progress = lambda what, done: None,
) -> Report:
    """Reads text files, or unless `full` the beginnings of some. Rows without the field text_key that are conversations
    or preferences are taken as such.

    Args:
        samples: documents that are shown.
    """
    sizes = dict(zip(files, sizes_of(files), strict=True))
    step = 1 if full else -(-len(files) // SAMPLE_DOCUMENTS)
    chosen = list(files)[::step]
    found = _Found(samples=_Samples(samples))
    what, whole = "", step == 1
    for number, path in enumerate(chosen):
        rooms = (SAMPLE_DOCUMENTS - len(found.lengths), SAMPLE_CHARACTERS - found.characters)
        documents, characters = (max(room // (len(chosen) - number), 1) for room in rooms)
        reader = _FileReader(path, text_key, None if full else characters)
        done, ended = _read(reader, found, tokenizer, None if full else (documents, characters))
        what, whole = what or reader.what, whole and ended
        found.bytes_read += sizes[path] * done
        progress("reading", (number + 1) / len(chosen))
    unit = "characters" if tokenizer is None else "tokens"
    facts = [("kind", what), ("files", _files(sizes)), *_sums(found, unit, sum(sizes.values()), whole)]
    count = len(found.lengths)
    part = None if whole else f"the beginning of {len(chosen):,} of {len(files):,} files, {count:,} documents"
    return Report(facts, np.array(found.lengths, np.int64), unit, found.samples.in_order(), found.problems, part)


def _sums(found: _Found, unit: str, total: int, whole: bool) -> list[tuple[str, str]]:
    """Facts about all documents, estimated by bytes unless they were all read.

    Args:
        total: bytes of all files.
    """
    count, length = len(found.lengths), sum(found.lengths)
    scale = total / found.bytes_read if found.bytes_read else 0.0
    facts = []
    for name, value in (("documents", count), (unit, length)):
        facts.append((name, f"{value:,}" if whole else f"about {_rounded(round(value * scale))}"))
    if unit == "tokens" and length:
        facts.append(("per token", f"{found.characters / length:.2f} characters"))
    if found.fields:
        facts.append(("fields", found.fields))
    if found.languages:
        shown = (f"{language} {count:,}" for language, count in found.languages.most_common())
        facts.append(("languages", ", ".join(shown)))
    return facts


def _rounded(count: int) -> str:
    """With two digits: an estimate is no more exact."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return f"{round(count / unit) * unit:,}"


def _files(sizes: dict[str, int]) -> str:
    kinds = Counter(entry.name if (entry := format_of(path)) else "text" for path in sizes)
    shown = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
    return f"{len(sizes):,} ({shown}), {size_text(sum(sizes.values()))}"


class _FileReader:
    """The documents of a file, and what they are."""

    def __init__(self, path: str, text_key: str, most: int | None) -> None:
        """
        Args:
            most: bytes of a file that is one document; None: all.
        """
        self.path, self.what, self.fields = path, "text", ""
        self.cut = False
        """Whether the document is longer than `most`."""
        self._key, self._format, self._most = text_key, format_of(path), most

    def read(self) -> Iterator[Document | BadRow]:
        entry = self._format
        if self._most is not None and (entry is None or entry.name in ("text", "code")):
            beginning = self._beginning(self._most)
            if beginning is not None:
                yield beginning
                return
        if entry is None:
            yield from read_text(self.path, self._key)
            return
        form = None if entry.rows is None else self._form(next(entry.rows(self.path), None))
        if entry.rows is None or form is None:
            yield from entry.read(self.path, self._key)
            return
        self.what, text_of = form
        for row in entry.rows(self.path):
            try:
                yield row.value if isinstance(row.value, BadRow) else _document(row, text_of(row.value))
            except ValueError as error:
                yield BadRow(row.where, f": {error}")

    def _beginning(self, most: int) -> Document | BadRow | None:
        """Of a file that is longer, so that a huge one is not read as a whole."""
        parts, size = [], 0
        for block, done in blocks(self.path):
            parts.append(block)
            size += len(block)
            if size > most:
                self.cut = done < 1
                content = without_mark(b"".join(parts), self.path)
                while most and content[most : most + 1] and content[most] & 0xC0 == 0x80:  # within a character
                    most -= 1
                text, replaced = decode(content[:most])
                return (binary(content) or Document(text, replaced, done)) if self.cut else None
        return None

    def _form(self, first: Row | None) -> tuple[str, Callable[[dict[str, Any]], str]] | None:
        """What the rows are other than text, as the first one tells."""
        if first is None or isinstance(first.value, BadRow):
            return None
        self.fields = ", ".join(f"{name} ({kind_of(value)})" for name, value in first.value.items())
        return None if self._key.partition(".")[0] in first.value else _form(first.value)


def _document(row: Row, text: str) -> Document:
    return Document(text, row.replaced, row.done, where=row.where)


def _form(row: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any]], str]] | None:
    """What a row without the text field is, and the text of such rows."""
    try:
        conversation_of(row)
        return "conversations (data=chat)", _conversation_text
    except ValueError:
        pass
    try:
        parse(row, _MOST_RESPONSES)
        return "preferences (data=preference)", _preference_text
    except ValueError:
        return None


def _conversation_text(row: dict[str, Any]) -> str:
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in conversation_of(row)[0])


def _preference_text(row: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else "\n".join(message_text(message) for message in value)

    pair = parse(row, _MOST_RESPONSES)
    return "\n---\n".join([text(pair.prompt), *map(text, pair.responses)])


def _read(
    reader: _FileReader, found: _Found, tokenizer: Tokenizer | None, limits: tuple[int, int] | None
) -> tuple[float, bool]:
    """Reads a file up to (documents, characters), and then to the end of the block that is in memory. Returns the
    fraction that was read, and whether it is all of the file."""
    texts: list[str] = []
    documents, bad, characters, done, ended = 0, 0, 0, 0.0, False
    try:
        for row in reader.read():
            enough = limits is not None and (documents >= limits[0] or bad >= limits[0] or characters >= limits[1])
            if isinstance(row, BadRow):
                found.problems.add("row without text", f"{reader.path} {row.where}{row.why}")
                bad += 1
                if enough and not documents:
                    break
                continue
            if enough and row.done > done:
                break
            done = row.done
            documents, characters = documents + 1, characters + len(row.text)
            _note(row, reader.path, f"document {documents:,}", found)
            texts.append(row.text)
            if len(texts) == _BATCH:
                _measure(texts, found, tokenizer)
                texts.clear()
        else:
            ended = not reader.cut
            done = 1.0 if ended else done
    except (ValueError, OSError, Damaged) as error:
        found.problems.add("file that cannot be read to its end", str(error))
        ended = True
    _measure(texts, found, tokenizer)
    found.characters += characters
    found.fields = found.fields or reader.fields
    return done, ended


def _note(document: Document, path: str, place: str, found: _Found) -> None:
    if document.text:
        found.samples.add(f"{path}, {place}", document.text)
    else:
        found.problems.add("empty document, left out", f"{path}, {place}")
    if document.replaced:
        where = f"{path}, {document.where or place}"
        found.problems.add("invalid UTF-8, replaced by U+FFFD", where, document.replaced)
    if document.language:
        found.languages[document.language] += 1


def _measure(texts: list[str], found: _Found, tokenizer: Tokenizer | None) -> None:
    texts = [text for text in texts if text]
    found.lengths += map(len, texts if tokenizer is None else tokenizer.encode_batch(texts))
