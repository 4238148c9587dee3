"""The data sources of a run: how each finds its files, and what they contain."""

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.registry import Registry
from corpus import storage
from corpus.documents import expand, has_rows, row_formats, standard_library_files
from corpus.shards import is_folder, shard_prefixes


@dataclass(frozen=True)
class DataSource:
    """A data source, selected by data.kind or by the kind of a part of a blend."""

    name: str
    find: Callable[[Sequence[str]], list[str]]
    """data.files -> absolute paths; of token files without .bin/.idx. Raises ValueError if there are none."""
    files: str | None
    """Description of data.files for messages. None: the source has no files."""
    yields: Literal["documents", "tokens", "conversations"] = "documents"
    """Text to be tokenised, .bin/.idx pairs, or (of data=chat alone) conversations to be rendered and tokenised."""
    read: Callable[[str, str], Iterator[str]] | None = None
    """(path, data.text_key) -> the text of each document, in order. None: read by the suffix of the file, as
    data=text."""
    version: int = 0
    """Incremented when `read` returns different documents for the same file, so that cached token files are rebuilt."""
    name_of: Callable[[str], str] | None = None
    """path -> a name of the file that is the same on every machine, whose hash determines whether all of it is held
    out. None: the hash of each document's text determines it."""


def _library_name(path: str) -> str:
    return Path(path).relative_to(sysconfig.get_path("stdlib")).as_posix()


def _prefixes(files: Sequence[str]) -> list[str]:
    """Prefixes as they are, and the shards of folders that have a manifest."""
    paths = [p if storage.is_url(p) else os.path.abspath(os.path.expanduser(p)) for p in files]
    return [prefix for path in paths for prefix in (shard_prefixes(path) if is_folder(path) else [path])]


def _rows(files: Sequence[str]) -> list[str]:
    found = expand(list(files))
    if plain := [path for path in found if not has_rows(path)]:
        raise ValueError(f"data=chat needs files with rows ({row_formats()}), but {plain[0]} has none")
    return found


SOURCES = Registry(
    "data source",
    DataSource("stdlib", lambda files: standard_library_files(), files=None, name_of=_library_name),
    DataSource("text", lambda files: expand(list(files)), files="paths, globs or folders of text files", version=1),
    DataSource("megatron", _prefixes, files="prefixes of .bin/.idx pairs, or folders of shards", yields="tokens"),
    DataSource("chat", _rows, files="paths or globs of files with conversations", yields="conversations", version=1),
)
