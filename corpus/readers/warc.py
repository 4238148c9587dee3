"""Web archives: the text in the records of WARC files, such as Common Crawl's WET files (ISO 28500:2017).

The text of HTML is what trafilatura takes for it, where it is installed: the article without navigation and footers,
and nothing for a page that has none. Common Crawl's WET files have all the text of a page instead.
"""

import io
import logging
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

from corpus.readers.compression import ContentStream, Damaged
from corpus.readers.rows import BadRow, Document, Row, decode, documents_of

_WITH_CONTENT = ("conversion", "resource", "response")
"""Types of records that have a page; others tell about the archive or the request."""
_LONGEST_LINE = 1 << 20  # bytes, of a header
_HTML = ("text/html", "application/xhtml+xml")


class _Record(NamedTuple):
    kind: str
    headers: dict[str, str]
    """By their names in lower case."""
    content: bytes


def read_rows(path: str) -> Iterator[Row]:
    """The records with a page: `text`, `url`, `date` and `language`, as the archive has them."""
    number = 0
    try:
        with ContentStream(path) as raw, io.BufferedReader(raw, 1 << 18) as stream:
            while record := _next(stream):
                number += 1
                if record.kind in _WITH_CONTENT:
                    yield _row(record, f"record {number}", raw.done)
    except Damaged as error:
        raise ValueError(f"{path} is damaged after record {number}: {error}") from error


def read_documents(path: str, text_key: str) -> Iterator[Document | BadRow]:
    """The text of each record with a page."""
    return documents_of(read_rows(path), "text")


def _next(stream: io.BufferedIOBase) -> _Record | None:
    """The record that follows; None at the end of the file."""
    line = stream.readline(_LONGEST_LINE)
    while line in (b"\r\n", b"\n"):  # two after each record
        line = stream.readline(_LONGEST_LINE)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise Damaged(f"a record begins with {line[:20]!r} instead of WARC/1.0 or 1.1")
    headers = _headers(stream)
    length = headers.get("content-length", "")
    if not length.isdecimal():
        raise Damaged(f"a record has the length {length!r}")
    content = stream.read(int(length))
    if len(content) < int(length):
        raise Damaged("it ends in the middle of a record")
    return _Record(headers.get("warc-type", ""), headers, content)


def _headers(stream: io.BufferedIOBase) -> dict[str, str]:
    """The lines up to an empty one."""
    headers = {}
    while (line := stream.readline(_LONGEST_LINE)) not in (b"\r\n", b"\n"):
        if not line:
            raise Damaged("it ends in the middle of a record")
        name, _, value = line.decode(errors="replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def _row(record: _Record, where: str, done: float) -> Row:
    content, kind, encoding = record.content, record.headers.get("content-type", ""), ""
    if record.kind == "response":
        stream = io.BytesIO(content)
        stream.readline()  # HTTP/1.1 200 OK
        try:
            headers = _headers(stream)
        except Damaged:
            return Row(where, BadRow(where, " has no HTTP response"), done)
        content, kind = stream.read(), headers.get("content-type", "")
        encoding = headers.get("content-encoding") or headers.get("transfer-encoding") or ""
    kind, extract = kind.partition(";")[0].strip().lower(), html_extractor()
    if kind != "text/plain" and not (kind in _HTML and extract):
        advice = "; use the .wet file of this archive, or: bash launch/setup.sh data" if kind in _HTML else ""
        return Row(where, BadRow(where, f" is {kind or 'of unknown type'}, not text/plain{advice}"), done)
    if encoding.lower() not in ("", "identity"):
        return Row(where, BadRow(where, f" is encoded ({encoding})"), done)
    if kind == "text/plain":
        text, replaced = decode(content)
    elif extract and (found := extract(content)):
        text, replaced = decode(found.encode(errors="replace"))
    else:
        return Row(where, BadRow(where, " is HTML in which trafilatura finds no text"), done)
    fields = {"url": "warc-target-uri", "date": "warc-date", "language": "warc-identified-content-language"}
    named = {name: record.headers[header] for name, header in fields.items() if header in record.headers}
    return Row(where, {"text": text} | named, done, replaced)


@cache
def html_extractor() -> Callable[[bytes], str | None] | None:
    """What extracts the text of HTML, or None where a page has none. None: trafilatura is not installed."""
    try:
        import trafilatura
    except ImportError:
        return None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # a page without text is counted here

    def extract(content: bytes) -> str | None:
        try:
            return trafilatura.extract(content, include_comments=False)
        except Exception:  # whatever parsers raise for what the web has
            return None

    return extract


def package_versions(path: str) -> list[str]:
    """What the documents of an archive depend on besides the file. WET files have no HTML."""
    return [] if ".wet" in path.lower() or html_extractor() is None else [_extractor_version()]


@cache
def _extractor_version() -> str:
    return f"trafilatura {version('trafilatura')}"
