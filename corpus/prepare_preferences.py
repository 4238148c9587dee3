"""Prepares data=preference: rows to token files in the cache, and their description as for other data.

A split is four arrays: tokens int32, counts bool (whether a token counts in a response's log-probability), the end of
each sequence in these, and the end of each prompt in the sequences.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from conf.schema import DataConfig
from corpus import storage
from corpus.cache import Cache
from corpus.chat_template import ChatTemplate
from corpus.documents import BadFile, BadRow, SkippedRows, expand, read_rows
from corpus.integrity import digests
from corpus.objects import check_unchanged, content_id
from corpus.preferences import Encoded, InvalidRow, Preference, encode, parse
from corpus.text import Progress
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import tokenizer_json

ARRAYS = ("tokens", "counts", "sequences", "prompts")
_FORMAT = 1  # version of the cache


@dataclass
class _Growing:
    """The arrays while they grow."""

    tokens: array = field(default_factory=lambda: array("i"))
    counts: bytearray = field(default_factory=bytearray)
    sequences: array = field(default_factory=lambda: array("q"))
    prompts: array = field(default_factory=lambda: array("q"))

    def add(self, responses: list[Encoded]) -> None:
        for response in responses:
            self.tokens.extend(response.ids)
            self.counts.extend(response.counts)
            self.sequences.append(len(self.tokens))
        self.prompts.append(len(self.sequences))

    def save(self, prefix: Path, chosen: np.ndarray) -> list[int]:
        """Writes some of the prompts. Returns the numbers of prompts and of tokens.

        Args:
            chosen: bool [prompts].
        """
        responses, lengths = (
            np.diff(np.frombuffer(ends, np.int64), prepend=0) for ends in (self.prompts, self.sequences)
        )
        sequences = np.repeat(chosen, responses)
        places = np.repeat(sequences, lengths)
        parts = (
            np.frombuffer(self.tokens, np.int32)[places],
            np.frombuffer(self.counts, np.bool_)[places],
            np.cumsum(lengths[sequences]),
            np.cumsum(responses[chosen]),
        )
        for name, part in zip(ARRAYS, parts, strict=True):
            np.save(f"{prefix}.{name}.npy", part, allow_pickle=False)
        return [int(chosen.sum()), int(places.sum())]


@dataclass(frozen=True)
class PreparedSplit:
    prefix: str
    prompts: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class PreparedPreferences:
    train: PreparedSplit | None
    valid: PreparedSplit | None
    tokenizer: str
    vocab_size: int
    eod_id: int | None
    notes: list[str]


def prepare_preferences(
    data: DataConfig,
    cache: Cache,
    *,
    vocab_size: int,
    sequence_length: int,
    max_responses: int,
    held_out_only: bool,
    progress: Progress,
) -> PreparedPreferences:
    """
    Args:
        max_responses: rows with more are skipped, as other rows that cannot be used.

    Raises:
        ValueError: as corpus.prepare.prepare.
    """
    path, tokenizer = _tokenizer(data, vocab_size)
    template = ChatTemplate.of(path, data.eod_token)
    held_out = [] if held_out_only else expand(data.valid_files)
    files = [file for file in expand(data.files) if file not in held_out]
    if not files:
        raise ValueError("data.valid_files names all files of the data; none is left to train on")
    share = 1.0 if held_out_only else 0.0 if held_out else data.valid_fraction
    contents = [storage.each(lambda file: content_id(file, cache), part) for part in (files, held_out)]
    key = [_FORMAT, contents, cache.sha256(path), data.eod_token, template.identity(), share]
    key += [sequence_length, max_responses, data.strict]

    def build(folder: Path) -> None:
        reader = _Reader(tokenizer, template, sequence_length, max_responses, strict=data.strict)
        everything, hashes = _Growing(), array("d")
        for preference, responses in reader.read(files, progress):
            everything.add(responses)
            hashes.append(_hash(preference))
        is_valid = _held_out(np.frombuffer(hashes), share)
        for _, responses in reader.read(held_out, progress):
            everything.add(responses)
        for file, content in zip([*files, *held_out], [*contents[0], *contents[1]], strict=True):
            check_unchanged(file, content)
        is_valid = np.concatenate([is_valid, np.ones(len(everything.prompts) - len(is_valid), np.bool_)])
        chosen = {"train": ~is_valid, "valid": is_valid}
        counts = {name: everything.save(folder / name, which) for name, which in chosen.items() if which.any()}
        (folder / "manifest.json").write_text(json.dumps({"splits": counts, "notes": reader.notes}))

    folder = cache.entry("preferences", key, build)
    manifest = json.loads((folder / "manifest.json").read_text())
    hashes = digests(folder)
    splits: dict[str, PreparedSplit | None] = {"train": None, "valid": None}
    for name, (prompts, tokens) in manifest["splits"].items():
        content = json.dumps([hashes[f"{name}.{part}.npy"] for part in ARRAYS])
        digest = hashlib.sha256(content.encode()).hexdigest()
        splits[name] = PreparedSplit(str(folder / name), prompts, tokens, digest)
    if not splits["valid"] or not (splits["train"] or held_out_only):
        raise ValueError("a single prompt cannot be split; set data.valid_files to held-out preferences, or add some")
    return PreparedPreferences(
        **splits, tokenizer=path, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, notes=manifest["notes"]
    )


def _tokenizer(data: DataConfig, vocab_size: int) -> tuple[str, Tokenizer]:
    """The tokenizer and its path. Raises ValueError if there is none, or one that is larger than the model's."""
    if data.tokenizer is None:
        raise ValueError(
            "data=preference needs data.tokenizer, or checkpoint.load of a run that has one: "
            "the tokenizer of the model that is trained"
        )
    path = tokenizer_json(data.tokenizer, "data.tokenizer")
    tokenizer = Tokenizer.load(path, data.eod_token)
    if tokenizer.vocab_size > vocab_size:
        size = tokenizer.vocab_size
        raise ValueError(
            f"{path} has {size} tokens, more than model.vocab_size={vocab_size}; set model.vocab_size={size} or more"
        )
    return path, tokenizer


def _hash(preference: Preference) -> float:
    """A number in [0, 1) that depends on the prompt alone, so that equal prompts are in the same split."""
    return int.from_bytes(hashlib.sha256(preference.key.encode()).digest()[:6], "big") / 2**48


def _held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Whether each prompt is held out: those with a hash below the share, or else the one with the smallest; none if
    the share is 0."""
    threshold = np.nextafter(hashes.min(), 1.0) if 0 < share < 1 and hashes.min() >= share else share
    return hashes < threshold


class _Reader:
    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, sequence_length: int, max_responses: int, *, strict: bool
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._length, self._most, self._strict = sequence_length, max_responses, strict
        self.notes: list[str] = []

    def read(self, files: list[str], progress: Progress) -> Iterator[tuple[Preference, list[Encoded]]]:
        """The rows that can be used. The others are counted in `notes`.

        Raises:
            ValueError: none can, or with `strict` one cannot.
        """
        usable, problems = False, []
        for path in files:
            skipped = SkippedRows()
            try:
                for found in self._of_file(path, skipped, progress):
                    usable = True
                    yield found
            except BadFile as error:
                if self._strict:
                    raise
                skipped.rest = str(error)
                problems.append(skipped.rest)
            if skipped:
                self.notes.append(skipped.note(path))
        if files and not usable:
            others = f"; none of the {len(problems)} files can be used" if len(problems) > 1 else ""
            raise ValueError(f"{problems[0]}{others}")

    def _of_file(
        self, path: str, skipped: SkippedRows, progress: Progress
    ) -> Iterator[tuple[Preference, list[Encoded]]]:
        usable = False
        for row in read_rows(path):
            try:
                preference = parse(row.value, self._most)
                responses = self._encode(preference)
            except InvalidRow as problem:
                skipped.add(BadRow(row.where, f" {problem}"), path, strict=self._strict)
                continue
            usable = True
            progress("tokenising", row.done)
            yield preference, responses
        if not usable:
            skipped.check_usable(path)
            raise BadFile(f"{path} has no rows")

    def _encode(self, preference: Preference) -> list[Encoded]:
        responses = encode(preference, self._tokenizer, self._template)
        longest = max(len(response.ids) for response in responses)
        if longest > self._length:
            raise InvalidRow(f"has {longest} tokens, more than train.sequence_length={self._length}")
        return responses
