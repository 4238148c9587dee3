"""Web archives: the plain text in the records of WARC files, such as Common Crawl's WET files (ISO 28500:2017).

The text of HTML is not extracted here: Common Crawl has it in its WET files, and libraries for that (trafilatura,
resiliparse) differ in what they take for text.
"""

import io
from collections.abc import Iterator
from typing import NamedTuple

from corpus.readers.compression import ContentStream, Damaged
from corpus.readers.rows import BadRow, Document, Row, decode, documents_of

_WITH_CONTENT = ("conversion", "resource", "response")
"""Types of records that have a page; others tell about the archive or the request."""
_LONGEST_LINE = 1 << 20  # bytes, of a header


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
    kind = kind.partition(";")[0].strip().lower()
    if kind != "text/plain":
        advice = "; use the .wet file of this archive" if "html" in kind else ""
        return Row(where, BadRow(where, f" is {kind or 'of unknown type'}, not text/plain{advice}"), done)
    if encoding.lower() not in ("", "identity"):
        return Row(where, BadRow(where, f" is encoded ({encoding})"), done)
    text, replaced = decode(content)
    fields = {"url": "warc-target-uri", "date": "warc-date", "language": "warc-identified-content-language"}
    named = {name: record.headers[header] for name, header in fields.items() if header in record.headers}
    return Row(where, {"text": text} | named, done, replaced)
