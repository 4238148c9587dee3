"""The kinds of data that a run can read: where each finds its files, and what they hold."""

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.registry import Registry
from corpus.documents import expand, standard_library_files


@dataclass(frozen=True)
class DataSource:
    """A value of data.kind, and of the kind of a part of a blend."""

    name: str
    find: Callable[[Sequence[str]], list[str]]
    """data.files -> absolute paths, of token files without .bin/.idx. Raises ValueError where there are none."""
    files: str | None
    """What data.files are, for messages; None: it takes none."""
    yields: Literal["documents", "tokens"] = "documents"
    """Text that is to be tokenised, or pairs of .bin/.idx."""
    read: Callable[[str, str], Iterator[str]] | None = None
    """(path, data.text_key) -> the text of each document, in order. None: by the file's suffix, as data=text does."""
    version: int = 0
    """Raised when `read` comes to give other documents for the same file, so that cached token files are made anew."""
    name_of: Callable[[str], str] | None = None
    """A name of a file that is the same on every machine, whose hash decides whether all of it is held out. None: a
    hash of the text decides, for each document."""


def _library_name(path: str) -> str:
    return Path(path).relative_to(sysconfig.get_path("stdlib")).as_posix()


def _prefixes(files: Sequence[str]) -> list[str]:
    return [os.path.abspath(os.path.expanduser(prefix)) for prefix in files]


SOURCES = Registry(
    "data source",
    DataSource("stdlib", lambda files: standard_library_files(), files=None, name_of=_library_name),
    DataSource("text", lambda files: expand(list(files)), files="paths or globs of text files"),
    DataSource("megatron", _prefixes, files="prefixes of .bin/.idx pairs", yields="tokens"),
)
