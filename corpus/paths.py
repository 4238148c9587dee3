"""The files that data settings name: paths, globs and folders, local ones and URLs."""

import difflib
import glob
import os
from pathlib import Path

from corpus import storage
from corpus.readers import arrow
from corpus.readers.compression import COMPRESSIONS
from corpus.readers.formats import described, format_of

_NOT_SOURCES = {"node_modules", "__pycache__"}
"""Folders in which tools put copies of what others wrote."""


def expand(patterns: list[str]) -> list[str]:
    """Absolute paths, or URLs, of the text files that match paths, globs and folders, without duplicates, sorted within
    each glob and folder. A folder stands for its files (`files_of`).

    Raises:
        ValueError: no such file, an empty or unreadable file that is named itself, only empty ones, or a suffix that is
            none of a file format.
    """
    paths = []
    for pattern in patterns:
        named = _named(pattern)
        found = [file for path in named for file in (files_of(path) if storage.is_folder(path) else [path])]
        for path in found:
            if format_of(path) is None:
                raise ValueError(f"{path}: unknown file format; supported are {described()}")
        sizes = [_size(path) for path in found]
        if not any(sizes):
            raise ValueError(f"{found[0]} is empty" + (f", and so are all files of {pattern}" if found[1:] else ""))
        # Writers of shards leave some empty, and so are many files of source code.
        paths += [path for path, size in zip(found, sizes, strict=True) if size]
    return list(dict.fromkeys(paths))


def files_of(folder: str) -> list[str]:
    """The files of a folder that can be read: those of a data set that `datasets` saved, or else all with the suffix of
    a file format, without hidden ones, installed packages, .json files that are not compressed, and the README of data.

    Raises:
        ValueError: there are none, or source code lies beside files with rows.
    """
    if (saved := arrow.saved_files(folder)) is not None:
        return saved
    try:
        below = storage.files_below(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    found = [path for path in below if _is_read(path.removeprefix(folder))]
    if not found:
        raise ValueError(f"{folder} has no file that can be read; supported are {described()}")
    formats = {path: format_of(path) for path in found}
    rows = [path for path, entry in formats.items() if entry and entry.rows is not None]
    if not rows:
        return found
    code = [path for path, entry in formats.items() if entry and entry.name == "code" and not _is_readme(path)]
    if code:
        raise ValueError(
            f"{folder} has rows ({rows[0]}) and source code ({code[0]}): name the files to be read, for example "
            f"{folder}/**/*{os.path.splitext(rows[0])[1]}"
        )
    return [path for path in found if not _is_readme(path)]


def _is_readme(path: str) -> bool:
    return os.path.basename(path).lower().startswith("readme")


def _is_read(relative: str) -> bool:
    entry = format_of(relative)
    if entry is None or not _NOT_SOURCES.isdisjoint(relative.split("/")):
        return False
    return entry.in_folders or relative.endswith(COMPRESSIONS)


def _named(pattern: str) -> list[str]:
    """The files and folders that a path or glob names. Raises ValueError if there are none."""
    if storage.is_url(pattern):
        system, path = storage.filesystem(pattern)
        try:
            exact = storage.is_file(pattern) or storage.is_folder(pattern)
            matches = [system.unstrip_protocol(path)] if exact else storage.glob(pattern)
        except OSError as error:
            raise ValueError(f"{pattern} cannot be read: {error.strerror}") from error
    else:
        pattern = os.path.expanduser(pattern)
        # A file may itself be called `a[1].txt`: an existing path is not a glob.
        matches = [os.path.abspath(p) for p in ([pattern] if os.path.exists(pattern) else storage.glob(pattern))]
    if not matches:
        what = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise ValueError(f"{pattern} {what}{nearest_existing(pattern)}")
    return matches


def _size(path: str) -> int:
    """Raises ValueError if the file cannot be read."""
    if not storage.is_url(path) and not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read by this user")
    try:
        return storage.size(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def nearest_existing(path: str) -> str:
    """The end of a message about a missing file: the most similar name in its directory, or the missing directory."""
    if storage.is_url(path):
        return ""
    try:
        os.stat(path)  # exists, but is not a file; or the name is invalid
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        return f": {error.strerror.lower() if isinstance(error, OSError) and error.strerror else error}"
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        while not folder.parent.is_dir():
            folder = folder.parent
        return f"; there is no {folder.name} in {folder.parent}"
    try:
        similar = difflib.get_close_matches(Path(path).name, os.listdir(folder), n=1, cutoff=0.5)
    except OSError:
        return ""  # a directory that this user cannot list
    return f"; did you mean {folder / similar[0]}?" if similar else ""
