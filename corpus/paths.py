"""The files that data settings name: paths, globs and folders, local ones and URLs."""

import difflib
import glob
import os
from pathlib import Path

from corpus import storage
from corpus.readers import arrow
from corpus.readers.compression import COMPRESSIONS
from corpus.readers.formats import described, format_of
from corpus.storage import Found

_NOT_SOURCES = {"node_modules", "__pycache__"}
"""Folders in which tools put copies of what others wrote."""


def expand(patterns: list[str]) -> list[str]:
    """Absolute paths, or URLs, of the text files that match paths, globs and folders, without duplicates, sorted within
    each glob and folder. A folder stands for its files (`files_of`).

    Raises:
        ValueError: no such file, one that this user cannot read, only empty ones, or a suffix that is none of a file
            format.
    """
    paths: list[str] = []
    empty: list[str] = []
    for pattern in patterns:
        found: list[Found] = []
        for named in _named(pattern):
            found += files_of(named.path) if named.is_folder else [named]
        for path, _, _ in found:
            if format_of(path) is None:
                raise ValueError(f"{path}: unknown file format; supported are {described()}")
            if not storage.is_url(path) and not os.access(path, os.R_OK):
                raise ValueError(f"{path} cannot be read by this user")
        # Writers of shards leave some empty, and so are many files of source code. One that stands for itself is kept,
        # so that it is reported.
        if not any(file.size for file in found):
            others = f", and so are all files of {pattern}" if found[1:] else ""
            empty.append(f"{found[0].path} is empty{others}")
            found = [found[0]._replace(size=1)]
        paths += [file.path for file in found if file.size]
    if empty and len(empty) == len(patterns):
        raise ValueError(empty[0])
    return list(dict.fromkeys(paths))


def files_of(folder: str) -> list[Found]:
    """The files of a folder that can be read: those of a data set that `datasets` saved, or else all with the suffix of
    a file format, without hidden ones, installed packages, .json files that are not compressed, and the README of data.

    Raises:
        ValueError: there are none, or source code lies beside files with rows.
    """
    try:
        if (saved := arrow.saved_files(folder)) is not None:
            return [_existing(path) for path in saved]
        found = [file for file in storage.files_below(folder) if _is_read(file.path.removeprefix(folder))]
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    if not found:
        raise ValueError(f"{folder} has no file that can be read; supported are {described()}")
    formats = {path: format_of(path) for path, _, _ in found}
    rows = [path for path, entry in formats.items() if entry and entry.rows is not None]
    if not rows:
        return found
    code = [path for path, entry in formats.items() if entry and entry.name == "code" and not _is_readme(path)]
    if code:
        raise ValueError(
            f"{folder} has rows ({rows[0]}) and source code ({code[0]}): name the files to be read, for example "
            f"{folder}/**/*{os.path.splitext(rows[0])[1]}"
        )
    return [file for file in found if not _is_readme(file.path)]


def _existing(path: str) -> Found:
    found = storage.find(path)
    if found is None:
        raise ValueError(f"{path} does not exist, though the data set beside it names it; save it again")
    return found


def _is_readme(path: str) -> bool:
    return os.path.basename(path).lower().startswith("readme")


def _is_read(relative: str) -> bool:
    entry = format_of(relative)
    if entry is None or not _NOT_SOURCES.isdisjoint(relative.split("/")):
        return False
    return entry.in_folders or relative.endswith(COMPRESSIONS)


def _named(pattern: str) -> list[Found]:
    """The files and folders that a path or glob names. Raises ValueError if there are none."""
    if not storage.is_url(pattern):
        pattern = os.path.expanduser(pattern)
    try:
        # A file may itself be called `a[1].txt`: an existing path is not a glob.
        exact = storage.find(pattern)
        matches = [exact] if exact else storage.glob(pattern)
    except (OSError, ValueError) as error:
        if storage.is_url(pattern):
            raise ValueError(_message(pattern, error)) from error
        matches = []
    if not matches:
        what = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise ValueError(f"{pattern} {what}{nearest_existing(pattern)}")
    return [one if storage.is_url(one.path) else one._replace(path=os.path.abspath(one.path)) for one in matches]


def _message(url: str, error: Exception) -> str:
    return f"{url} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def check_exists(setting: str, path: str) -> None:
    """Raises ValueError, with what is nearest, if the path that a setting names is not there."""
    given = os.path.expanduser(path)
    if not os.path.exists(given):
        raise ValueError(f"{setting}={path} does not exist{nearest_existing(given)}")


def nearest_existing(path: str) -> str:
    """The end of a message about a missing file: the most similar name in its directory, or the missing directory."""
    if storage.is_url(path):
        return ""
    try:
        os.stat(path)  # exists, but is not a file; or the name is invalid
    except FileNotFoundError:
        if os.path.islink(path):
            return f": it is a link to {os.readlink(path)}, which is not there"
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
