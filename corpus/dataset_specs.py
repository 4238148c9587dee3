"""Resolves the data settings to files, and checks that they are consistent."""

import os
from dataclasses import dataclass

from conf.schema import DATA_KINDS, BlendPart, DataConfig
from corpus import storage
from corpus.documents import is_text_file
from corpus.shards import check_tokenizer, is_folder
from corpus.sources import SOURCES, DataSource
from corpus.tokenizer_files import tokenizer_json


@dataclass(frozen=True, eq=False)  # equal parts of a blend are different data sets
class DatasetSpec:
    """Text files or token files with a common weight and held-out fraction."""

    kind: str
    """Name of a data source (corpus/sources.py)."""
    files: list[str]
    """Absolute paths; of token files without .bin/.idx."""
    weight: float
    """Share of the training samples, relative to the other data sets. 0: the number of epochs is given."""
    valid_share: float
    """Fraction of the documents that is held out, 0 to 1."""

    @property
    def source(self) -> DataSource:
        return SOURCES[self.kind]


def dataset_specs(data: DataConfig, held_out_only: bool) -> list[DatasetSpec]:
    """The data sets of the data, then those of data.valid_files. Files of data.valid_files are not trained on, even if
    a glob of data.files matches them.

    Args:
        held_out_only: all of the data is held out, and data.valid_files is ignored.

    Raises:
        ValueError: inconsistent settings, or missing files.
    """
    if not 0 < data.valid_fraction < 1:
        raise ValueError(f"data.valid_fraction={data.valid_fraction} must lie between 0 and 1, for example 0.02")
    held_out = [] if held_out_only else _held_out(data)
    named = {os.path.realpath(path) for spec in held_out for path in spec.files}
    valid_share = 1.0 if held_out_only else 0.0 if held_out else data.valid_fraction
    result = []
    if data.tokenizer is not None:
        _check_tokenizer(data, data.tokenizer)
    for part in _parts(data):
        files = [path for path in _files(part) if os.path.realpath(path) not in named]
        if not files:
            raise ValueError("data.valid_files names all files of the data; none is left to train on")
        weight = part.weight if part.epochs is None else 0.0
        result.append(DatasetSpec(part.kind, files, weight, valid_share))
    return result + held_out


def is_chat(data: DataConfig, part: int) -> bool:
    """Whether a data set of the settings is conversations. `part`: as of `corpus.prepare.Source`; numbers beyond the
    parts of a blend are those of data.valid_files."""
    if data.kind == "blend":
        return part < len(data.blend) and data.blend[part].kind == "chat"
    return data.kind == "chat"


def _check_tokenizer(data: DataConfig, tokenizer: str) -> None:
    """Raises ValueError for a folder of shards that were made with another tokenizer."""
    for part in _parts(data):
        for path in part.files if part.kind == "megatron" else ():
            folder = path if storage.is_url(path) else os.path.expanduser(path)
            if is_folder(folder):
                check_tokenizer(folder, tokenizer_json(tokenizer, "data.tokenizer"))


def _parts(data: DataConfig) -> list[BlendPart]:
    if data.kind != "blend":
        return [BlendPart(weight=1.0, kind=data.kind, files=data.files)]
    if not data.blend:
        raise ValueError("data=blend needs its parts, for example data.blend=[{kind: stdlib, weight: 1}]")
    if data.files:
        raise ValueError("data=blend takes its files from data.blend, not from data.files")
    for part in data.blend:
        if part.epochs is None and part.weight <= 0:
            raise ValueError(f"data.blend: the weight {part.weight} of the {part.kind} part must be positive")
    return list(data.blend)


def _held_out(data: DataConfig) -> list[DatasetSpec]:
    """data.valid_files by kind: for megatron data and blends, those with an .idx, or without the suffix of a text file,
    are prefixes. For chat and sources of extensions they are like data.files."""
    if data.valid_files and (data.kind == "chat" or data.kind not in DATA_KINDS):
        files = _files(BlendPart(kind=data.kind, files=data.valid_files))
        return [DatasetSpec(data.kind, files, weight=0.0, valid_share=1.0)]
    may_be_prefix = data.kind in ("megatron", "blend")
    prefixes = [
        path
        for path in data.valid_files
        if may_be_prefix and (not is_text_file(path) or storage.is_file(f"{path}.idx"))
    ]
    texts = [path for path in data.valid_files if path not in prefixes]
    return [
        DatasetSpec(kind, _files(BlendPart(kind=kind, files=files)), weight=0.0, valid_share=1.0)
        for kind, files in (("text", texts), ("megatron", prefixes))
        if files
    ]


def _files(part: BlendPart) -> list[str]:
    if part.kind not in SOURCES:
        raise ValueError(f"kind of data {part.kind!r} is not one of {', '.join(SOURCES)}")
    source = SOURCES[part.kind]
    if source.files is None and part.files:
        raise ValueError(f"data={part.kind} has no files; for your own text use data=text data.files=[...]")
    if source.files is not None and not part.files:
        raise ValueError(f"data of kind {part.kind} needs files: {source.files}")
    return source.find(part.files)
