"""A corpus of conversations: which are held out, and tokenising them with a loss weight per token."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from corpus.cache import Cache
from corpus.chat_template import ChatTemplate, encode_chat
from corpus.conversations import FIRST_LABEL, WEIGHTS, Conversation, read_conversations
from corpus.documents import BadFile, BadRow, Document, SkippedRows
from corpus.objects import sizes_of
from corpus.pair_writer import PairWriter, dtype_of, remove_lengths
from corpus.text import Progress, Split, TextCorpus
from corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class _ChatDocument(Document):
    conversation: Conversation


class ChatCorpus(TextCorpus):
    """The conversations of a data set. As documents they are what the messages say, for training a tokenizer."""

    def _of_file(self, path: str, skipped: SkippedRows) -> Iterator[Document]:
        for conversation in read_conversations(path, strict=self._strict, skipped=skipped):
            yield _ChatDocument(conversation.text, 0, conversation.done, conversation)

    @cached_property
    def split(self) -> Split:
        """As of text, but never a part of a conversation: if the hashes select none, the one with the smallest."""
        share = self.spec.valid_share
        if share in (0.0, 1.0):
            return Split(share)
        smallest = 1.0
        for path in self.spec.files:
            for document in self._read(path):
                smallest = min(smallest, self._hash_value(path, document))
                if smallest < share:
                    return Split(share)
        return Split(math.nextafter(smallest, 1.0))

    def identity(self, cache: Cache) -> list[Any]:
        # Of rows, text_key is not read.
        kind, names, contents, share, _, *others = super().identity(cache)
        return [kind, names, contents, share, *others]

    def encoded(
        self, template: ChatTemplate, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[int], list[float], bool, float]]:
        """Of each conversation its token ids, their weights, whether it is held out, and the fraction of the corpus
        read so far. Those that the template refuses are skipped, or with `strict` an error."""
        sizes = sizes_of(self.spec.files)
        before, total = 0, sum(sizes)
        for path, size in zip(self.spec.files, sizes, strict=True):
            usable = False
            for document, held_out in self.documents(path):
                assert isinstance(document, _ChatDocument)
                chat = document.conversation
                try:
                    ids, weights = encode_chat(template, tokenizer, chat.messages, chat.tools)
                    if not any(weights[1:]):
                        raise ValueError(_why_untrained(template, chat))
                except ValueError as error:
                    self.skipped[path].add(BadRow(chat.where, f": {error}"), path, strict=self._strict)
                    continue
                usable = True
                yield ids, weights, held_out, (before + document.done * size) / total
            if not usable and not self.skipped[path].rest:
                try:
                    self.skipped[path].check_usable(path)
                except BadFile as error:
                    self.skipped[path].rest = str(error)
            before += size


def _why_untrained(template: ChatTemplate, chat: Conversation) -> str:
    """Why no token of a conversation has a weight."""
    if any(message["role"] == "assistant" and message.get("weight") != 0 for message in chat.messages):
        return f"{template.name} writes nothing of what the assistant says, or does not mark it"
    return "every message of the assistant has weight 0"


class _Writer:
    """Writes the conversations of a split."""

    def __init__(self, prefix: str, tokenizer: Tokenizer) -> None:
        self._pair = PairWriter(prefix, dtype_of(tokenizer.vocab_size))
        self._weights = open(prefix + WEIGHTS, "wb")  # noqa: SIM115 (closed by finish)
        self._first: list[int] = []

    @property
    def counts(self) -> dict[str, int]:
        documents, tokens = self._pair.position
        return {"num_documents": documents, "num_tokens": tokens}

    def add(self, ids: list[int], weights: list[float]) -> None:
        as_array = np.array(weights, dtype=np.float32)
        self._pair.append(np.array([True]), np.array(ids), np.array([len(ids)]))
        self._weights.write(as_array.tobytes())
        # The first token is no target.
        self._first.append(1 + int(np.flatnonzero(as_array[1:])[0]))

    def finish(self) -> None:
        self._pair.finish()
        self._pair.close()
        remove_lengths(self._pair.prefix)
        self._weights.close()
        np.array(self._first, dtype=np.int32).tofile(self._pair.prefix + FIRST_LABEL)


def write_chat(
    corpus: ChatCorpus, template: ChatTemplate, tokenizer_path: str, folder: Path, progress: Progress
) -> None:
    """Writes the token files of each split that has conversations, their weights, and `manifest.json` into `folder`.

    Raises:
        ValueError: no conversation can be used, or with `strict` one cannot.
    """
    tokenizer = Tokenizer.load(tokenizer_path, None)
    writers: dict[str, _Writer] = {}
    for ids, weights, held_out, done in corpus.encoded(template, tokenizer):
        split = "valid" if held_out else "train"
        if split not in writers:
            writers[split] = _Writer(str(folder / split), tokenizer)
        writers[split].add(ids, weights)
        progress("tokenising", done)
    if not writers:
        corpus.check_usable()
    splits = {}
    for split, writer in writers.items():
        writer.finish()
        splits[split] = writer.counts
    measured = (
        {"valid_bytes": None, "valid_gzip_bytes": None}
        if "valid" in writers
        else dict.fromkeys(("valid_bytes", "valid_gzip_bytes"), 0)
    )
    notes = [rows.note(path) for path, rows in corpus.skipped.items() if rows]
    manifest = {"splits": splits, "held_out": measured, "notes": notes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
