"""Inspects Megatron token files."""

import itertools
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from corpus import storage
from corpus.indexed import Index, is_id, read_index
from corpus.inspection.report import Problems, Progress, Report, size_text
from corpus.objects import explained
from corpus.tokenizer import Tokenizer

SAMPLE_TOKENS = 64 * 1024 * 1024
"""What is read unless all is asked for, in up to _RANGES ranges of documents."""
_RANGES = 64
_SHOWN = 200
"""Tokens of a sample."""


class _Pair:
    """An open .bin/.idx pair, whose .bin may be an object."""

    def __init__(self, prefix: str, index: Index, tokens: BinaryIO, tokenizer: Tokenizer | None) -> None:
        self.prefix, self.tokenizer, self._tokens = prefix, tokenizer, tokens
        self.dtype = np.dtype(index.dtype)
        ends = np.append(index.pointers // self.dtype.itemsize, index.begin(len(index.lengths)))
        self.begins = ends[index.documents]
        """The number of tokens before each document, and of all; int64 [documents + 1]."""

    def ids(self, begin: int, end: int) -> np.ndarray:
        """The tokens from position `begin` to before `end`."""
        self._tokens.seek(begin * self.dtype.itemsize)
        return np.frombuffer(self._tokens.read((end - begin) * self.dtype.itemsize), self.dtype)


def is_token_file(path: str) -> bool:
    """Whether it is the prefix of a .bin/.idx pair, or one of the two. Raises ValueError if it cannot be found out."""
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    return path != prefix or explained(path, lambda _: storage.is_file(prefix + ".idx"))


def inspect_tokens(
    path: str, *, tokenizer: Tokenizer | None, full: bool, samples: int, progress: Progress = lambda what, done: None
) -> Report:
    """Reads a .bin/.idx pair: all lengths, and unless `full` the tokens of some ranges of documents.

    Raises:
        ValueError: the pair is damaged.
    """
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            index = read_index(_local_index(prefix, Path(temporary)) if storage.is_url(prefix) else prefix)
            with storage.open_binary(prefix + ".bin") as tokens:
                pair = _Pair(prefix, index, tokens, tokenizer)
                return _report(pair, full=full, samples=samples, progress=progress)
    except OSError as error:
        raise ValueError(f"{prefix} cannot be read: {error.strerror or error}") from error


def _report(pair: _Pair, *, full: bool, samples: int, progress: Progress) -> Report:
    lengths, total = np.diff(pair.begins), int(pair.begins[-1])
    facts = [
        ("kind", f"Megatron token file, {pair.dtype.name}"),
        ("documents", f"{len(lengths):,}"),
        ("tokens", f"{total:,} ({size_text(total * pair.dtype.itemsize)})"),
    ]
    report = Report(facts, lengths, "tokens", _samples(pair, samples), Problems(), None)
    if empty := np.flatnonzero(lengths == 0).tolist():
        report.problems.add("empty document", f"{pair.prefix}, document {empty[0] + 1:,}", len(empty))
    _read_ids(report, pair, full, progress)
    return report


def _samples(pair: _Pair, count: int) -> list[tuple[str, str]]:
    """The beginnings of some documents, evenly spread."""
    found, documents = [], len(pair.begins) - 1
    for number in np.unique(np.linspace(0, documents - 1, min(count, documents)).astype(np.int64)).tolist():
        begin, end = pair.begins[number : number + 2].tolist()
        ids = pair.ids(begin, min(end, begin + _SHOWN))
        if pair.tokenizer is None:
            text = " ".join(f"{number:.12g}" for number in ids.tolist())
        else:
            text = pair.tokenizer.decode(ids[is_id(ids, pair.tokenizer.vocab_size)].astype(np.int64).tolist())
        found.append((f"document {number + 1:,}", text))
    return found


def _local_index(prefix: str, folder: Path) -> str:
    """A copy of the .idx, beside a .bin of the right size without content."""
    (folder / "pair.idx").write_bytes(storage.read_bytes(prefix + ".idx"))
    with (folder / "pair.bin").open("wb") as file:
        file.truncate(storage.size(prefix + ".bin"))
    return str(folder / "pair")


def _read_ids(report: Report, pair: _Pair, full: bool, progress: Progress) -> None:
    """Adds what the ids tell: their range, and what is wrong with them."""
    begins = pair.begins
    read, extremes = 0, []
    chosen = _ranges(begins, full)
    for number, (first, end) in enumerate(chosen):
        ids = pair.ids(int(begins[first]), int(begins[end]))
        read += len(ids)
        valid = ids[is_id(ids, None)]
        if len(valid):
            extremes += [int(valid.min()), int(valid.max())]
        _check_ids(report, pair, ids, first, end)
        progress("reading", (number + 1) / len(chosen))
    if extremes:
        without = "" if pair.tokenizer else ", no tokenizer to decode them"
        report.facts.append(("ids", f"{min(extremes):,} to {max(extremes):,}{without}"))
    if read < int(begins[-1]):
        report.part = f"all lengths, and {read:,} of {int(begins[-1]):,} tokens in {len(chosen)} places"


def _ranges(begins: np.ndarray, full: bool) -> list[tuple[int, int]]:
    """(first, end) of the documents that are read: evenly spread, unless all are."""
    count, total = len(begins) - 1, int(begins[-1])
    if full or total <= SAMPLE_TOKENS:
        parts = max(-(-total // (SAMPLE_TOKENS // _RANGES)), 1)
        cuts = np.searchsorted(begins, np.linspace(0, total, parts + 1))
        cuts[0], cuts[-1] = 0, count
        return [(int(a), int(b)) for a, b in itertools.pairwise(cuts) if b > a]
    size = SAMPLE_TOKENS // _RANGES
    found = []
    for start in np.linspace(0, total - size, _RANGES).astype(np.int64):
        first = int(np.searchsorted(begins, start))
        end = max(int(np.searchsorted(begins, start + size, side="right")) - 1, min(first + 1, count))
        if first < end and (not found or first >= found[-1][1]):
            found.append((first, end))
    return found


def _check_ids(report: Report, pair: _Pair, ids: np.ndarray, first: int, end: int) -> None:
    """Numbers that are no ids, ids that the tokenizer does not have, and documents that do not end with the
    end-of-document token."""
    begins = pair.begins[first : end + 1] - pair.begins[first]

    def add(kind: str, at: np.ndarray) -> None:
        if at.size:
            document = first + int(np.searchsorted(begins, at[0], side="right"))
            report.problems.add(kind, f"{pair.prefix}, document {document:,}: {ids[at[0]]}", int(at.size))

    add("number that is no token id", np.flatnonzero(~is_id(ids, None)))
    if pair.tokenizer is None:
        return
    size, eod_id = pair.tokenizer.vocab_size, pair.tokenizer.eod_id
    add(f"id beyond the {size:,} of the tokenizer", np.flatnonzero(is_id(ids, None) & (ids >= size)))
    if eod_id is not None:
        last = begins[1:][np.diff(begins) > 0] - 1
        add("document without the end-of-document token", last[ids[last] != eod_id])
