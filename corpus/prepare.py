"""Prepares the data of a run: validates and tokenises it once, and describes the result for every rank.

With an empty cache this trains the tokenizer and writes token files. With a warm cache it reads a few small JSON files:
neither PyTorch nor Megatron-Core is imported, and no data is read.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.schema import DataConfig
from corpus import storage
from corpus.answers import remembering
from corpus.cache import Cache
from corpus.conversations import WEIGHTS
from corpus.dataset_specs import DatasetSpec, dataset_specs
from corpus.integrity import digests
from corpus.object_blocks import described
from corpus.objects import content_of_pair, hash_files, local_pairs
from corpus.prepared_checks import check_conversations, check_held_out, check_training, without_short_files
from corpus.text import MANIFEST, Progress, TextCorpus, tokenizer_sample, write_corpus
from corpus.tokenizer_files import tokenizer_json

_FORMAT = 2  # version of the cache; incremented when the same settings lead to different token files


@dataclass(frozen=True)
class Source:
    """A range of documents of a token file."""

    prefix: str
    """Path without .bin/.idx."""
    weight: float
    """Share of the samples that are taken by weight, over which the training sources add up to 1; 0: by `quotas`."""
    first_document: int
    num_documents: int
    num_tokens: int
    sha256: str = field(default="", compare=False)
    """Hash of both files."""
    part: int = field(default=0, compare=False)
    """The data set of the settings that it belongs to: its place in data.blend."""
    quotas: list[int] | None = None
    """Of a part with epochs: the samples that each stage of the run takes. None: as many as the weight gives."""
    id_limit: int | None = None
    """Ids must be smaller, which is checked when they are read. None: it was checked for all of them."""


@dataclass(frozen=True)
class Prepared:
    """The description of prepared data: everything that a rank needs to open it."""

    train: list[Source]
    valid: list[Source]
    tokenizer: str | None
    """Path of the tokenizer.json; None only for megatron data without one."""
    vocab_size: int
    """Largest id of the tokenizer plus one; without a tokenizer, largest id of the data plus one."""
    eod_id: int | None
    valid_bytes: int | None
    """UTF-8 bytes of the held-out text; None when the text is not known (megatron data)."""
    valid_gzip_bytes: int | None
    """The same after `gzip -9`, added up over the parts of a blend."""
    notes: list[str]
    """Messages for the user."""

    @property
    def key(self) -> str:
        """Identifies the training and held-out data: equal for equal token files in the same order with the same
        weights, independent of their paths."""

        def content(source: Source) -> dict[str, Any]:
            left_out = ("part", "quotas", "id_limit")
            return {k: v for k, v in asdict(source).items() if k not in left_out} | {"prefix": ""}

        return _key([[content(source) for source in split] for split in (self.train, self.valid)])

    def gzip_bits_per_byte(self) -> float | None:
        """Bits per byte of `gzip -9` on the held-out text. None: unknown."""
        if not self.valid_bytes or self.valid_gzip_bytes is None:
            return None
        return 8 * self.valid_gzip_bytes / self.valid_bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Prepared":
        fields = json.loads(text)
        sources = {split: [Source(**source) for source in fields.pop(split)] for split in ("train", "valid")}
        return cls(**sources, **fields)


@dataclass(frozen=True)
class _Part:
    """The sources of a data set. Weights are not yet normalised."""

    train: list[Source]
    valid: list[Source]
    valid_bytes: int | None
    valid_gzip_bytes: int | None
    notes: list[str]


@dataclass(frozen=True)
class _Vocabulary:
    path: str | None
    size: int
    eod_id: int | None


def prepare(
    data: DataConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    progress: Progress | None = None,
    held_out_only: bool = False,
    timeout: float = 600.0,
    max_responses: int = 2,
) -> Prepared:
    """Validates the data, tokenises what is not in the cache, and describes the result.

    Several processes may call this concurrently: one does the work, the others wait.

    Args:
        vocab_size: rows of the model's embedding; also the size of a tokenizer trained here.
        sequence_length: tokens per sample.
        progress: called regularly with the current activity and the fraction of it that is done. An exception that it
            raises ends the preparation.
        held_out_only: all of the data is held out, and may be shorter than a sequence: evaluation on given files.
        timeout: seconds to wait for another process that does the work without making progress.
        max_responses: of data=preference, the most that a prompt has.

    Raises:
        LockTimeout: the timeout has expired.
        ValueError: invalid settings or files; the message names them and what would work.
    """
    progress = progress or (lambda what, done: None)
    notes: list[str] = []
    cache = Cache(data.cache_dir, notes.append, timeout=timeout, waiting=lambda what: progress(what, 0.0))
    how = {"held_out_only": held_out_only, "progress": progress}
    try:
        with remembering(cache) as answers:
            if data.kind == "preference":
                sizes = {"vocab_size": vocab_size, "sequence_length": sequence_length, "max_responses": max_responses}
                prepared = _of_preferences(data, cache, notes, sizes, **how)
            else:
                prepared = _of_sources(data, cache, notes, vocab_size, **how)
    finally:
        cache.save_facts()  # even after an error: hashing a large corpus is expensive
    if data.kind == "chat":
        check_conversations(prepared, data, held_out_only)
    elif data.kind != "preference":
        if not held_out_only:
            prepared = without_short_files(prepared, sequence_length, data)
            check_training(prepared, sequence_length, data)
        check_held_out(prepared, 1 if held_out_only else sequence_length, data)
    return replace(prepared, notes=[*prepared.notes, *answers.notes()])


def _of_sources(
    data: DataConfig, cache: Cache, notes: list[str], vocab_size: int, *, held_out_only: bool, progress: Progress
) -> Prepared:
    found = dataset_specs(data, held_out_only)
    for number, spec in enumerate(found):
        if spec.source.yields == "tokens":
            files = local_pairs(spec.files, cache, progress, stream=data.objects == "stream")
            found[number] = replace(spec, files=files)
    parts, vocabulary = _parts(data, found, vocab_size, cache, progress)
    if data.document_mask and vocabulary.eod_id is None:
        raise ValueError("data.document_mask=true needs data.tokenizer, to know where documents end")
    return _combine(parts, vocabulary, notes, data.temperature)


def _parts(
    data: DataConfig, found: list[DatasetSpec], vocab_size: int, cache: Cache, progress: Progress
) -> tuple[list[_Part], _Vocabulary]:
    """The sources of each data set, whose text is tokenised where it is not in the cache, and their vocabulary."""
    corpora = {spec: _corpus(spec, data) for spec in found if spec.source.yields != "tokens"}
    local = [path for spec in corpora for path in spec.files if not storage.is_url(path)]
    hash_files(local, cache, progress)
    vocabulary = _vocabulary(data, found, list(corpora.values()), vocab_size, cache, progress)
    parts = []
    for spec in found:
        if spec in corpora:
            folder = _tokenise(corpora[spec], vocabulary, data, cache, progress)
            parts.append(_read_manifest(folder, spec.weight))
        else:
            vocabulary = _check_token_ids(spec.files, vocabulary, vocab_size, cache)
            files = [prefix + suffix for prefix in spec.files for suffix in (".idx", ".bin")]
            hash_files([path for path in files if os.path.exists(path)], cache, progress)
            parts.append(_read_megatron(spec, cache, vocabulary.size))
    return parts, vocabulary


def _of_preferences(
    data: DataConfig, cache: Cache, notes: list[str], sizes: dict[str, int], *, held_out_only: bool, progress: Progress
) -> Prepared:
    """A document is a prompt with its responses."""
    from corpus.prepare_preferences import prepare_preferences

    found = prepare_preferences(data, cache, **sizes, held_out_only=held_out_only, progress=progress)
    train, valid = (
        [Source(split.prefix, 1.0, 0, split.prompts, split.tokens, split.sha256)] if split else []
        for split in (found.train, found.valid)
    )
    return Prepared(
        train, valid, found.tokenizer, found.vocab_size, found.eod_id, None, None, notes=[*notes, *found.notes]
    )


def _vocabulary(
    data: DataConfig,
    found: list[DatasetSpec],
    corpora: list[TextCorpus],
    vocab_size: int,
    cache: Cache,
    progress: Progress,
) -> _Vocabulary:
    """The given tokenizer, or one trained on the training text, or none if there is no text."""
    if data.tokenizer is not None:
        path = tokenizer_json(data.tokenizer, "data.tokenizer")
    elif not corpora:
        return _Vocabulary(None, 0, None)
    elif len(corpora) < len(found):
        raise ValueError("text together with megatron data needs data.tokenizer: the tokenizer.json of the token files")
    else:
        path = str(_train_tokenizer(data, corpora, vocab_size, cache, progress) / "tokenizer.json")

    def load(path: str) -> tuple[int, int | None]:
        from corpus.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(path, data.eod_token)
        return tokenizer.vocab_size, tokenizer.eod_id

    size, eod_id = cache.fact(path, f"vocabulary with {data.eod_token}", load)
    if size > vocab_size:
        raise ValueError(
            f"{path} has {size} tokens, more than model.vocab_size={vocab_size}; set model.vocab_size={size} or more"
        )
    return _Vocabulary(path, size, eod_id)


def _train_tokenizer(
    data: DataConfig, corpora: list[TextCorpus], vocab_size: int, cache: Cache, progress: Progress
) -> Path:
    """The cache entry with the tokenizer.json trained on the training text of these corpora."""
    training = [corpus for corpus in corpora if corpus.spec.valid_share < 1]
    if not training:
        raise ValueError(
            "data.tokenizer is needed if all text is held out; a tokenizer is trained on training text only"
        )

    def build(folder: Path) -> None:
        from corpus.tokenizer import Tokenizer

        def sample() -> Iterator[str]:
            for text in tokenizer_sample(training, data.tokenizer_sample_mib * 2**20):
                progress("training the tokenizer", 0.0)
                yield text

        tokenizer = Tokenizer.train(sample(), vocab_size=vocab_size, eod_token=data.eod_token)
        tokenizer.save(str(folder / "tokenizer.json"))
        progress("training the tokenizer", 1.0)

    settings = [_FORMAT, vocab_size, data.tokenizer_sample_mib, data.eod_token]
    return cache.entry("tokenizers", [settings, [corpus.identity(cache) for corpus in training]], build)


def _corpus(spec: DatasetSpec, data: DataConfig) -> TextCorpus:
    if spec.source.yields == "documents":
        return TextCorpus(spec, data.text_key, strict=data.strict)
    from corpus.chat import ChatCorpus

    return ChatCorpus(spec, data.text_key, strict=data.strict)


def _tokenise(corpus: TextCorpus, vocabulary: _Vocabulary, data: DataConfig, cache: Cache, progress: Progress) -> Path:
    """The cache entry with the token files of the corpus and its manifest."""
    path = vocabulary.path
    assert path is not None
    key = [_FORMAT, corpus.identity(cache), cache.sha256(path), data.eod_token]
    if corpus.spec.source.yields == "conversations":
        from corpus.chat import ChatCorpus, write_chat
        from corpus.chat_template import ChatTemplate

        assert isinstance(corpus, ChatCorpus)
        template = ChatTemplate.of_data(data, path)
        key.append(template.identity())
        return cache.entry("tokens", key, lambda folder: write_chat(corpus, template, path, folder, progress))

    def build(folder: Path) -> None:
        write_corpus(corpus, path, data.eod_token, folder, progress)

    return cache.entry("tokens", key, build, resume=True)


def _read_manifest(folder: Path, weight: float) -> _Part:
    manifest, sha256 = json.loads((folder / MANIFEST).read_text()), digests(folder)
    sources: dict[str, list[Source]] = {"train": [], "valid": []}
    for split, counts in manifest["splits"].items():
        files = [f"{split}{suffix}" for suffix in (".idx", ".bin", WEIGHTS)]
        digest = _key([sha256[name] for name in files if name in sha256])
        sources[split] = [Source(str(folder / split), weight, 0, counts["num_documents"], counts["num_tokens"], digest)]
    return _Part(**sources, **manifest["held_out"], notes=manifest["notes"])


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_megatron(spec: DatasetSpec, cache: Cache, num_ids: int) -> _Part:
    """Validates the pairs and holds out the last documents of each."""
    from corpus.indexed import checked_index

    train, valid = [], []
    for prefix in spec.files:
        index, digest = checked_index(prefix, cache), _key(content_of_pair(prefix, cache))
        more = {"sha256": digest, "id_limit": num_ids if described(prefix) else None}
        documents, share = index.num_documents, spec.valid_share
        held_out = round(documents * share)
        if 0 < share < 1:  # at least one document of each split, if there are two or more
            held_out = min(max(held_out, 1), documents - 1)
        kept = documents - held_out
        if held_out:
            valid.append(Source(prefix, 0.0, kept, held_out, index.num_tokens(kept, held_out), **more))
        if kept:
            train.append(Source(prefix, 0.0, 0, kept, index.num_tokens(0, kept), **more))
    # One epoch of the data set is one epoch of each file.
    tokens = sum(source.num_tokens for source in train)
    train = [replace(source, weight=spec.weight * source.num_tokens / max(tokens, 1)) for source in train]
    return _Part(train, valid, None if valid else 0, None if valid else 0, [])


def _check_token_ids(prefixes: list[str], vocabulary: _Vocabulary, vocab_size: int, cache: Cache) -> _Vocabulary:
    """Checks the ids in token files against the vocabulary; without a tokenizer, extends the vocabulary to them."""
    from corpus.indexed import checked_index, extreme_ids

    for prefix in prefixes:
        index = checked_index(prefix, cache)
        if not index.num_tokens(0, index.num_documents):
            raise ValueError(f"{prefix}.bin contains no tokens")
        if described(prefix):  # its ids are checked when they are read
            vocabulary = vocabulary if vocabulary.path else replace(vocabulary, size=vocab_size)
            continue
        fact = f"extreme ids as {index.dtype.__name__}"
        lowest, highest = cache.fact(prefix + ".bin", fact, lambda _, prefix=prefix: extreme_ids(prefix))
        if lowest < 0:
            raise ValueError(f"{prefix}.bin contains the token id {lowest}; ids cannot be negative")
        if highest >= vocab_size:
            raise ValueError(
                f"{prefix}.bin contains the token id {highest}, beyond model.vocab_size={vocab_size}; "
                f"set model.vocab_size={highest + 1} or more"
            )
        if vocabulary.path is None:
            vocabulary = replace(vocabulary, size=max(vocabulary.size, highest + 1))
        elif highest >= vocabulary.size:
            raise ValueError(
                f"{prefix}.bin contains the token id {highest}, but {vocabulary.path} has {vocabulary.size} tokens; "
                "set data.tokenizer to the one that the file was created with"
            )
    return vocabulary


def _combine(parts: list[_Part], vocabulary: _Vocabulary, notes: list[str], temperature: float | None) -> Prepared:
    train = [
        replace(source, part=number, weight=source.weight * _by_size(part, temperature))
        for number, part in enumerate(parts)
        for source in part.train
    ]
    valid = [replace(source, part=number) for number, part in enumerate(parts) for source in part.valid]
    total = sum(source.weight for source in train) or 1.0
    tokens = sum(source.num_tokens for source in valid)
    known = all(part.valid_bytes is not None for part in parts)
    return Prepared(
        train=[replace(source, weight=source.weight / total) for source in train],
        valid=[replace(source, weight=source.num_tokens / tokens) for source in valid],
        tokenizer=vocabulary.path,
        vocab_size=vocabulary.size,
        eod_id=vocabulary.eod_id,
        valid_bytes=sum(part.valid_bytes for part in parts) if known else None,
        valid_gzip_bytes=sum(part.valid_gzip_bytes for part in parts) if known else None,
        notes=[*notes, *(note for part in parts for note in part.notes)],
    )


def _by_size(part: _Part, temperature: float | None) -> float:
    """The factor of a data set's weight for its size."""
    return 1.0 if temperature is None else sum(source.num_tokens for source in part.train) ** (1 / temperature)
