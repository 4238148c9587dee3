"""Tokenises documents into .bin/.idx pairs: one, or those of the splits of a corpus, which a killed process may leave
half-written and another one continues.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from corpus.encoder import Encoder, open_encoder
from corpus.integrity import read_sealed, write_sealed
from corpus.pair_writer import NOTHING, PairWriter, Position, dtype_of, remove_lengths
from corpus.tokenizer import Tokenizer

_JOURNAL = "journal.json"
_VERSION = 1
"""Of the journal; incremented when what it describes changes."""
_SHARD_CHARACTERS = 64 * 2**20
"""Of all documents, between two entries of the journal."""


class TextSize:
    """The bytes of a text, and those of its `gzip -9`."""

    def __init__(self, num_bytes: int = 0, gzip_bytes: int = 0) -> None:
        self.num_bytes, self.gzip_bytes = num_bytes, gzip_bytes
        self._member: Any = None

    def add(self, text: str) -> None:
        if self._member is None:
            self._member = zlib.compressobj(9, wbits=31)
        data = text.encode()
        self.num_bytes += len(data)
        self.gzip_bytes += len(self._member.compress(data))

    def end_member(self) -> None:
        """Completes `gzip_bytes`. A text that is added later is compressed by itself."""
        if self._member is not None:
            self.gzip_bytes += len(self._member.flush())
            self._member = None


class TokenWriter:
    """Tokenises documents into a .bin/.idx pair."""

    def __init__(
        self,
        prefix: str,
        tokenizer: Tokenizer,
        *,
        measure: bool,
        encoder: Encoder | None = None,
        start: Position = NOTHING,
        size: tuple[int, int] = (0, 0),
    ) -> None:
        """
        Args:
            measure: whether to count the bytes of the text, and of its `gzip -9`.
            encoder: where the texts are encoded, which others may use too. None: on the threads of this process.
            start, size: of a pair that is continued, what to keep of it and the bytes of its text.

        Raises:
            ValueError: the pair has less than `start`.
        """
        assert tokenizer.eod_id is not None
        dtype = dtype_of(tokenizer.vocab_size)
        self.num_documents = start.documents
        self.pair = PairWriter(prefix, dtype, start)
        self.size = TextSize(*size)
        self._tokenizer, self._measure = tokenizer, measure
        self._encoder = encoder or open_encoder(tokenizer, dtype, workers=0)
        self._texts: list[str] = []  # not yet given to the encoder
        self._last: list[bool] = []
        self._characters = 0

    @property
    def num_bytes(self) -> int:
        return self.size.num_bytes

    @property
    def gzip_bytes(self) -> int:
        return self.size.gzip_bytes

    def add(self, text: str) -> None:
        """Appends a document and its end-of-document token."""
        parts = self._tokenizer.segments(text)
        for number, part in enumerate(parts, start=1):
            self._texts.append(part)
            self._last.append(number == len(parts))
            self._characters += len(part)
            if self._measure:
                self.size.add(part)
            if self._characters >= self._encoder.batch_characters:
                self.flush()
        self.num_documents += 1

    def flush(self) -> None:
        """Gives the encoder all documents."""
        if self._texts:
            last_P = np.array(self._last)
            self._encoder.put(self._texts, self._last, partial(self.pair.append, last_P))
        self._texts, self._last, self._characters = [], [], 0

    def finish(self) -> None:
        """Writes the remaining documents and the .idx file."""
        self.finish_pair()
        remove_lengths(self.pair.prefix)

    def finish_pair(self) -> None:
        """As `finish`, without removing what a writer that continues would need."""
        self.flush()
        self._encoder.drain()
        self.pair.finish()
        self.pair.close()
        self.size.end_member()


class CorpusWriter:
    """Tokenises the documents of a corpus into train.bin/.idx and valid.bin/.idx of a folder, each only where there are
    documents. After a shard of documents it records what is written (and on the disk) in a journal. A writer that finds
    one continues there, whatever its process has written beyond it; the files are then the same bit for bit. Where the
    journal or a file does not fit, it begins anew.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, workers: int) -> None:
        """
        Args:
            workers: processes that encode. 0: the threads of this process do.
        """
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = dtype_of(tokenizer.vocab_size)
        self._encoder = open_encoder(tokenizer, self._dtype, workers)
        self._writers: dict[str, TokenWriter] = {}
        self._characters = 0
        self.restored: Any = None
        """What `end_shard` was given for the newest entry of the journal. None: there is none."""
        try:
            self._restore()
        except (OSError, ValueError, KeyError, TypeError):
            self._writers = {}

    def _restore(self) -> None:
        journal = read_sealed(self._folder / _JOURNAL)
        if journal["version"] != _VERSION:
            raise ValueError("the journal is another version's")
        for split, (documents, tokens, *size) in journal["splits"].items():
            self._open(split, Position(documents, tokens), tuple(size))
        self.restored = journal["state"]

    def _open(self, split: str, start: Position = NOTHING, size: tuple[int, int] = (0, 0)) -> TokenWriter:
        how = {"measure": split == "valid", "encoder": self._encoder, "start": start, "size": size}
        self._writers[split] = TokenWriter(str(self._folder / split), self._tokenizer, **how)
        return self._writers[split]

    def add(self, text: str, *, held_out: bool) -> None:
        """Appends a document."""
        split = "valid" if held_out else "train"
        (self._writers.get(split) or self._open(split)).add(text)
        self._characters += len(text)

    @property
    def shard_is_full(self) -> bool:
        return self._characters >= _SHARD_CHARACTERS

    def end_shard(self, state: Any) -> None:
        """Ends a shard after the last document. The journal is written when its tokens are, by a later call.

        Args:
            state: JSON-serialisable, for `restored`.
        """
        self._characters = 0
        for writer in self._writers.values():
            writer.flush()
            writer.size.end_member()
        sizes = {split: (writer.num_bytes, writer.gzip_bytes) for split, writer in self._writers.items()}
        writers = dict(self._writers)

        def record(*_: np.ndarray) -> None:
            splits = {}
            for split, writer in writers.items():
                writer.pair.sync()
                splits[split] = [*writer.pair.position, *sizes[split]]
            write_sealed(self._folder / _JOURNAL, {"version": _VERSION, "splits": splits, "state": state})

        self._encoder.put([], [], record)

    def finish(self) -> dict[str, TokenWriter]:
        """Writes the .idx files. Returns the writers by split."""
        for writer in self._writers.values():
            writer.finish_pair()
        return self._writers

    def close(self) -> None:
        self._encoder.close()


def remove_journal(folder: Path) -> None:
    """Removes what a `CorpusWriter` has left to continue from, once the folder is complete."""
    for file in folder.glob(f"{_JOURNAL}*"):  # also one that was half-written when its process was killed
        file.unlink()
    for split in ("train", "valid"):
        remove_lengths(str(folder / split))
