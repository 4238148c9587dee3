"""The file formats of text by their suffixes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from conf.registry import Registry
from corpus.readers import arrow, jsonl, parquet, plain, warc
from corpus.readers.compression import COMPRESSIONS
from corpus.readers.rows import BadRow, Document, Row, documents_of


@dataclass(frozen=True)
class FileFormat:
    """How the files with some suffixes are read: at least one of `rows` and `documents`."""

    name: str
    suffixes: tuple[str, ...]
    """Lower case, with their dot. Where several formats match, the longest suffix counts."""
    rows: Callable[[str], Iterator[Row]] | None = None
    """path -> its rows. None: a file has no rows with fields."""
    documents: Callable[[str, str], Iterator[Document | BadRow]] | None = None
    """(path, data.text_key) -> the text of each document. None: that in the field text_key of each row."""
    names: tuple[str, ...] = ()
    """Names of files without a suffix."""
    compressed: bool = True
    """Whether the readers decompress files (corpus/readers/compression.py), so that the suffix of a compression may
    follow."""
    versions: Callable[[str], list[str]] | None = None
    """path -> the versions of packages that its documents depend on: with other ones, data are prepared again."""
    in_folders: bool = True
    """Whether the files of a folder are read that is named as a whole."""

    def read(self, path: str, text_key: str) -> Iterator[Document | BadRow]:
        """The text of each document."""
        if self.documents is not None:
            return self.documents(path, text_key)
        assert self.rows is not None
        return documents_of(self.rows(path), text_key)


def _check(entry: FileFormat) -> None:
    if entry.rows is None and entry.documents is None:
        raise ValueError(f"file format {entry.name}: neither rows nor documents says how it is read")
    if not all(suffix.startswith(".") for suffix in entry.suffixes):
        raise ValueError(f"file format {entry.name}: a suffix begins with a dot, unlike one of {entry.suffixes}")


FORMATS = Registry(
    "file format",
    FileFormat("text", (".txt",), documents=plain.read_text),
    FileFormat("jsonl", (".jsonl", ".ndjson"), jsonl.read_lines, jsonl.read_line_documents),
    # In a folder of source code they are settings.
    FileFormat("json", (".json",), rows=jsonl.read_json, in_folders=False),
    FileFormat("parquet", (".parquet",), parquet.read_rows, parquet.read_documents, compressed=False),
    FileFormat("arrow", (".arrow",), arrow.read_rows, arrow.read_documents, compressed=False),
    FileFormat("warc", (".wet", ".warc"), warc.read_rows, warc.read_documents, versions=warc.package_versions),
    FileFormat("code", plain.CODE_SUFFIXES, documents=plain.read_code, names=plain.CODE_NAMES),
    check=_check,
)


def format_of(path: str) -> FileFormat | None:
    """The format of a file by its name. None: it is none of these."""
    name, compressed = PurePath(path).name, False
    for suffix in COMPRESSIONS:
        if name.endswith(suffix):
            name, compressed = name.removesuffix(suffix), True
            break
    for entry in FORMATS.values():
        if name in entry.names and (entry.compressed or not compressed):
            return entry
    lower = name.lower()
    fitting = [
        (len(suffix), entry)
        for entry in FORMATS.values()
        for suffix in entry.suffixes
        if lower.endswith(suffix) and (entry.compressed or not compressed)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def described(*, rows: bool = False) -> str:
    """The suffixes, for messages.

    Args:
        rows: only of formats with rows.
    """
    entries = [entry for entry in FORMATS.values() if entry.rows is not None or not rows]
    of_data = [suffix for entry in entries for suffix in entry.suffixes if entry.name != "code"]
    code = ", source code by its suffix" if any(entry.name == "code" for entry in entries) else ""
    return f"{' '.join(of_data)} (also with {' '.join(COMPRESSIONS)}){code}"


def package_versions(paths: Sequence[str]) -> list[str]:
    """The versions of packages that the documents of some files depend on besides the files."""
    readers = ((path, entry.versions) for path in paths if (entry := format_of(path)))
    return list(dict.fromkeys(version for path, versions in readers if versions for version in versions(path)))
