"""A corpus of text files: which of its documents are held out, and tokenising it."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus import storage
from corpus.cache import Cache
from corpus.dataset_specs import DatasetSpec
from corpus.documents import BadFile, Document, SkippedRows, read_documents
from corpus.objects import check_unchanged, content_id, sizes_of
from corpus.readers.formats import package_versions
from corpus.readers.rows import replaced_note

if TYPE_CHECKING:
    from corpus.token_writer import CorpusWriter

Progress = Callable[[str, float], None]
"""Called with the current activity and the fraction of it that is done."""


MANIFEST = "manifest.json"
_COUNTS = ("num_documents", "num_tokens")
_LARGE = 32 * 2**20
"""Bytes of files from which on processes of their own tokenise: their start takes half a second."""
_SHORT = 4096  # characters
_SMALL_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """Which documents are held out."""

    threshold: float
    """Documents with a smaller hash value are held out."""
    smallest: float = 1.0
    tail: int = 0
    """Of the documents with the hash value `smallest`, about this many characters at the end are held out."""


class TextCorpus:
    """The documents of a data set of text files."""

    def __init__(self, spec: DatasetSpec, text_key: str, *, strict: bool = False) -> None:
        """
        Args:
            text_key: the field of a row that has its text.
            strict: raise an error for a row without text instead of skipping it.
        """
        self.spec = spec
        self.skipped: dict[str, SkippedRows] = {}
        """Skipped rows, by file that `documents` has read."""
        self._text_key = text_key
        self._strict = strict
        self._contents: dict[str, str] = {}

    def identity(self, cache: Cache) -> list[Any]:
        """Everything that determines the documents and which of them are held out, JSON-serialisable."""
        kind, files, source = self.spec.kind, self.spec.files, self.spec.source
        names = [(source.name_of or os.path.basename)(path) for path in files]
        contents = storage.each(lambda path: content_id(path, cache), files)
        self._contents = dict(zip(files, contents, strict=True))
        # Data that was read without `strict` may have rows that are errors with it.
        version = [source.version] if source.version else []
        version += package_versions(files)
        return [kind, names, contents, self.spec.valid_share, self._text_key, self._strict, *version]

    def documents(self, path: str) -> Iterator[tuple[Document, bool]]:
        """The documents of a file, in order, and whether each is held out. A document whose end is held out is returned
        as two."""
        split, self.skipped[path] = self.split, SkippedRows()
        for document in self._read(path, self.skipped[path]):
            hash_value = self._hash_value(path, document)
            if split.tail and hash_value == split.smallest:
                begin = _tail_begin(document.text, split.tail)
                yield replace(document, text=document.text[:begin]), False
                yield replace(document, text=document.text[begin:], replaced=0), True
            else:
                yield document, hash_value < split.threshold
        check_unchanged(path, self._contents.get(path))

    def _read(self, path: str, skipped: SkippedRows | None = None) -> Iterator[Document]:
        """The documents of a file, up to where it is damaged."""
        skipped = SkippedRows() if skipped is None else skipped
        try:
            yield from self._of_file(path, skipped)
        except BadFile as error:
            if self._strict:
                raise
            skipped.rest = str(error)

    def check_usable(self) -> None:
        """Called if the corpus has no documents. Raises ValueError if that is because they cannot be used."""
        bad = {path: rows for path, rows in self.skipped.items() if rows}
        if bad:
            path, rows = next(iter(bad.items()))
            others = f"; none of the {len(bad)} files can be used" if len(bad) > 1 else ""
            raise ValueError(f"{rows.rest or rows.note(path)}{others}")

    def _of_file(self, path: str, skipped: SkippedRows) -> Iterator[Document]:
        read = self.spec.source.read
        if read is None:
            return read_documents(path, self._text_key, strict=self._strict, skipped=skipped)
        return (Document(text, 0, 0.0) for text in read(path, self._text_key))

    def _hash_value(self, path: str, document: Document) -> float:
        """A number in [0, 1) that depends only on the name of the file or on the text, so that equal documents are in
        the same split and a growing corpus keeps its held-out documents."""
        name_of = self.spec.source.name_of
        key = document.text if name_of is None else name_of(path)
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48

    @cached_property
    def split(self) -> Split:
        """Documents with a hash value below valid_share are held out; if there are none, the document with the smallest
        hash value: all of it if there are others and it is short, otherwise its end."""
        share = self.spec.valid_share
        if share in (0.0, 1.0):
            return Split(share)
        smallest, length, characters, others = 1.0, 0, 0, False
        for path in self.spec.files:
            for document in self._read(path):
                hash_value = self._hash_value(path, document)
                if hash_value < share:
                    return Split(share)
                others |= characters > 0 and hash_value != smallest
                characters += len(document.text)
                if hash_value < smallest:
                    smallest, length = hash_value, len(document.text)
        if others and length <= max(_SHORT, characters * _SMALL_SHARE):
            return Split(math.nextafter(smallest, 1.0))
        return Split(0.0, smallest, min(max(math.ceil(share * characters), _SHORT), length // 4))


def _tail_begin(text: str, size: int) -> int:
    """The index at which the last `size` characters or slightly fewer begin, at the start of a line or else of a
    word."""
    begin = len(text) - size
    newline, space = (text.find(character, begin, begin + size // 2) for character in "\n ")
    return newline + 1 if newline >= 0 else space if space >= 0 else begin


def tokenizer_sample(corpora: list[TextCorpus], max_bytes: int) -> Iterator[str]:
    """Training text of at most `max_bytes`. Each file contributes its beginning, in proportion to its size on disk, so
    that all files are represented and little more than the sample is read."""
    sizes = [sizes_of(corpus.spec.files) for corpus in corpora]
    total = sum(map(sum, sizes))
    allowed = used = 0
    for corpus, of_files in zip(corpora, sizes, strict=True):
        for path, size in zip(corpus.spec.files, of_files, strict=True):
            allowed += max_bytes * size / total
            for document, held_out in corpus.documents(path):
                room = int(allowed) - used
                if room <= 0:
                    break
                if not held_out:
                    piece = document.text.encode()[:room]
                    used += len(piece)
                    yield piece.decode(errors="ignore")  # the last character may be incomplete


@dataclass
class _Read:
    """How far a corpus is read, and what the user is told about it. JSON-serialisable."""

    files: int = 0
    """Files that are read to their end."""
    documents: int = 0
    """Documents of the next file that are read."""
    skipped: list[str] = field(default_factory=list)
    """Messages about what was left out of these files."""
    replaced: dict[str, int] = field(default_factory=dict)
    """Invalid UTF-8 sequences by file."""
    first_replaced: dict[str, str] = field(default_factory=dict)
    """The first document of each of these files that has some."""
    tails: dict[str, int] = field(default_factory=dict)
    """Characters at the end of documents that were split, by file."""

    def notes(self) -> list[str]:
        found = (replaced_note(path, count, self.first_replaced.get(path, "")) for path, count in self.replaced.items())
        return [*self.skipped, *found, *_tail_notes(self.tails)]


def write_corpus(
    corpus: TextCorpus,
    tokenizer_path: str,
    eod_token: str,
    folder: Path,
    progress: Progress,
    *,
    workers: int | None = None,
) -> None:
    """Writes train.bin/.idx and valid.bin/.idx (each only where it has documents) and `manifest.json` into `folder`.

    What a process that was killed has written of the same corpus into the same folder is continued from the last shard
    of documents that was complete; `manifest.json` is there once all is.

    Args:
        workers: processes that tokenise; 0: none but this one, in threads. None: one for each core that this process
            may use, if the corpus is large enough to gain by it.
    """
    from corpus.encoder import usable_cores
    from corpus.token_writer import CorpusWriter, remove_journal
    from corpus.tokenizer import Tokenizer

    if not (folder / MANIFEST).exists():
        sizes = sizes_of(corpus.spec.files)
        if workers is None:
            workers = usable_cores() if sum(sizes) >= _LARGE and usable_cores() > 1 else 0
        writer = CorpusWriter(folder, Tokenizer.load(tokenizer_path, eod_token), workers=workers)
        try:
            _write_documents(corpus, sizes, writer, folder, progress)
        finally:
            writer.close()
    remove_journal(folder)


def _write_documents(
    corpus: TextCorpus, sizes: list[int], writer: "CorpusWriter", folder: Path, progress: Progress
) -> None:
    read = _Read(**(writer.restored or {}))
    written = read.documents
    before, total = sum(sizes[: read.files]), sum(sizes)
    for path, size in zip(corpus.spec.files[read.files :], sizes[read.files :], strict=True):
        for number, (document, held_out) in enumerate(corpus.documents(path), start=1):
            done = (before + document.done * size) / total
            if number <= written:
                progress("reading what is tokenised", done)
                continue
            writer.add(document.text, held_out=held_out)
            read.documents = number
            if document.replaced:
                read.replaced[path] = document.replaced + read.replaced.get(path, 0)
                read.first_replaced.setdefault(path, document.where)
            if held_out and corpus.split.tail:
                read.tails[path] = len(document.text) + read.tails.get(path, 0)
            progress("tokenising", done)
            if writer.shard_is_full:
                writer.end_shard(asdict(read))
        skipped = corpus.skipped.get(path)
        read.skipped += [skipped.note(path)] if skipped else []
        before, written = before + size, 0
        read.files, read.documents = read.files + 1, 0
    writers = writer.finish()
    if not writers:
        corpus.check_usable()
    splits = {split: dict(zip(_COUNTS, one.pair.position, strict=True)) for split, one in writers.items()}
    measured = {
        "valid_bytes": writers["valid"].num_bytes if "valid" in writers else 0,
        "valid_gzip_bytes": writers["valid"].gzip_bytes if "valid" in writers else 0,
    }
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps({"splits": splits, "held_out": measured, "notes": read.notes()}))
    os.replace(partial, folder / MANIFEST)


def _tail_notes(tails: dict[str, int]) -> list[str]:
    """Messages about documents that were split."""
    return [
        f"the last {count:,} characters of {path} are held out, since there are too few documents to hold out a whole "
        "one; set data.valid_files to choose others"
        for path, count in tails.items()
    ]
