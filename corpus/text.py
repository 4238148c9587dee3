"""A corpus of text files: which documents are held out, and turning it into token files."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from corpus.cache import Cache
from corpus.documents import Document, LeftOut, read_documents
from corpus.ingredients import Ingredient

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, 0 to 1."""


_SHORT = 4096  # characters
_SMALL_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """Which documents are held out."""

    threshold: float
    """Those that draw less, whole."""
    smallest: float = 1.0
    tail: int = 0
    """Of those that draw `smallest`, about this many characters at the end; 0: none."""


class TextCorpus:
    """The documents of an ingredient of text."""

    def __init__(self, ingredient: Ingredient, text_key: str, *, strict: bool = False) -> None:
        """
        Args:
            text_key: the field of a row that holds its text.
            strict: stop at a row without text, which is left out otherwise.
        """
        self.ingredient = ingredient
        self.left_out: dict[str, LeftOut] = {}
        """Of the files that `documents` has read."""
        self._text_key = text_key
        self._strict = strict

    def identity(self, cache: Cache) -> list[Any]:
        """All that decides which documents there are and which of them are held out, JSON-serialisable."""
        kind, files, source = self.ingredient.kind, self.ingredient.files, self.ingredient.source
        names = [(source.name_of or os.path.basename)(path) for path in files]
        contents = [cache.sha256(path) for path in files]
        # What was read without `strict` may hold rows that it stops at.
        version = [source.version] if source.version else []
        return [kind, names, contents, self.ingredient.valid_share, self._text_key, self._strict, *version]

    def documents(self, path: str) -> Iterator[tuple[Document, bool]]:
        """The documents of one of the files, in order, and whether each is held out. One of which only the tail is held
        out comes as two."""
        split, self.left_out[path] = self.split, LeftOut()
        for document in self._read(path, self.left_out[path]):
            draw = self._draw(path, document)
            if split.tail and draw == split.smallest:
                begin = _tail_begin(document.text, split.tail)
                yield replace(document, text=document.text[:begin]), False
                yield replace(document, text=document.text[begin:], replaced=0), True
            else:
                yield document, draw < split.threshold

    def _read(self, path: str, left_out: LeftOut | None = None) -> Iterator[Document]:
        read = self.ingredient.source.read
        if read is None:
            return read_documents(path, self._text_key, strict=self._strict, left_out=left_out)
        return (Document(text, 0, 0.0) for text in read(path, self._text_key))

    def _draw(self, path: str, document: Document) -> float:
        """A number in [0, 1) that depends on nothing but the file's name or the text, so that equal documents never end
        up on both sides and a corpus that grows keeps its held-out documents."""
        name_of = self.ingredient.source.name_of
        key = document.text if name_of is None else name_of(path)
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48

    @cached_property
    def split(self) -> Split:
        """Documents that draw less than valid_share are held out; where none would be, the one with the smallest draw:
        whole, when others are left and it is short, otherwise its tail."""
        share = self.ingredient.valid_share
        if share in (0.0, 1.0):
            return Split(share)
        smallest, length, characters, others = 1.0, 0, 0, False
        for path in self.ingredient.files:
            for document in self._read(path):
                draw = self._draw(path, document)
                if draw < share:
                    return Split(share)
                others |= characters > 0 and draw != smallest
                characters += len(document.text)
                if draw < smallest:
                    smallest, length = draw, len(document.text)
        if others and length <= max(_SHORT, characters * _SMALL_SHARE):
            return Split(math.nextafter(smallest, 1.0))
        return Split(0.0, smallest, min(max(math.ceil(share * characters), _SHORT), length // 4))


def _tail_begin(text: str, size: int) -> int:
    """Where the last `size` characters or a little less begin: with a line, or else with a word."""
    begin = len(text) - size
    newline, space = (text.find(character, begin, begin + size // 2) for character in "\n ")
    return newline + 1 if newline >= 0 else space if space >= 0 else begin


def tokenizer_sample(corpora: list[TextCorpus], max_bytes: int) -> Iterator[str]:
    """Training text of at most `max_bytes`. Each file gives from its beginning, in proportion to its size on disk, so
    that all are represented and little more than the sample is read."""
    total = sum(os.path.getsize(path) for corpus in corpora for path in corpus.ingredient.files)
    allowed = used = 0
    for corpus in corpora:
        for path in corpus.ingredient.files:
            allowed += max_bytes * os.path.getsize(path) / total
            for document, held_out in corpus.documents(path):
                room = int(allowed) - used
                if room <= 0:
                    break
                if not held_out:
                    piece = document.text.encode()[:room]
                    used += len(piece)
                    yield piece.decode(errors="ignore")  # the last character may have been cut


def write_corpus(corpus: TextCorpus, tokenizer_path: str, eod_token: str, folder: Path, progress: Progress) -> None:
    """Writes train.bin/.idx and valid.bin/.idx (each only where it has documents) and `manifest.json` into `folder`."""
    from corpus.indexed import TokenWriter, read_index
    from corpus.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_path, eod_token)
    writers: dict[str, TokenWriter] = {}
    replaced: dict[str, int] = {}
    tails: dict[str, int] = {}
    for document, path, held_out, done in _all_documents(corpus):
        split = "valid" if held_out else "train"
        if split not in writers:
            writers[split] = TokenWriter(str(folder / split), tokenizer, measure=held_out)
        writers[split].add(document.text)
        if document.replaced:
            replaced[path] = document.replaced + replaced.get(path, 0)
        if held_out and corpus.split.tail:
            tails[path] = len(document.text) + tails.get(path, 0)
        progress("tokenising", done)
    splits, measured = {}, {"valid_bytes": 0, "valid_gzip_bytes": 0}
    for split, writer in writers.items():
        writer.finish()
        tokens = read_index(str(folder / split)).num_tokens(0, writer.num_documents)
        splits[split] = {"num_documents": writer.num_documents, "num_tokens": tokens}
    if "valid" in writers:
        measured = {"valid_bytes": writers["valid"].num_bytes, "valid_gzip_bytes": writers["valid"].gzip_bytes}
    left_out = [rows.note(path) for path, rows in corpus.left_out.items() if rows.count]
    notes = [*left_out, *_replacement_notes(replaced), *_tail_notes(tails)]
    manifest = {"splits": splits, "held_out": measured, "notes": notes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _all_documents(corpus: TextCorpus) -> Iterator[tuple[Document, str, bool, float]]:
    """Documents, their files, whether they are held out, and the share of the corpus read so far."""
    sizes = [os.path.getsize(path) for path in corpus.ingredient.files]
    before, total = 0, sum(sizes)
    for path, size in zip(corpus.ingredient.files, sizes, strict=True):
        for document, held_out in corpus.documents(path):
            yield document, path, held_out, (before + document.done * size) / total
        before += size


def _replacement_notes(replaced: dict[str, int]) -> list[str]:
    """What to tell the user about the invalid UTF-8 sequences that were replaced in each file."""
    return [
        f"{count} invalid UTF-8 sequence{'s' if count > 1 else ''} replaced in {path}"
        for path, count in replaced.items()
    ]


def _tail_notes(tails: dict[str, int]) -> list[str]:
    """What to tell the user about documents that were split."""
    return [
        f"the last {count:,} characters of {path} are held out, since there are too few documents to hold out a whole "
        "one; data.valid_files names others"
        for path, count in tails.items()
    ]
