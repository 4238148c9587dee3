"""Whether the files of a cache entry are those that were written: sizes and SHA-256 of each, kept beside them."""

import hashlib
import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any

_HASHES = "files.json"
"""Size and SHA-256 of every file of an entry, under a hash of its own; written last, so that a folder with it was
finished."""
_STAMPS = "verified.json"
"""What the file system said of the large files when they were last hashed."""
ALWAYS_HASHED = 1024 * 1024
"""Bytes. Files up to this size are hashed whenever an entry is opened, larger ones once and then only when their inode,
size, modification or change time is another: 1.2 GiB/s on one core, so that a start does not read a large corpus."""


def stamp(status: os.stat_result) -> list[int]:
    """What differs once a file was written to or replaced: unlike the modification time, no user can set the change
    time back. The device is left out, since nodes may number the same file system differently."""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all, with a hash by which `read_sealed` finds damage."""
    text = json.dumps(content)
    # Not a process number, which other nodes have too.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps({"sha256": _digest(text), "content": content}))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_sealed(path: Path) -> Any:
    """What `write_sealed` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: there is none, or it cannot be read.
    """
    try:
        sealed = json.loads(path.read_bytes())
        content = sealed["content"]
        if sealed["sha256"] == _digest(json.dumps(content)):
            return content
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    raise ValueError(f"{path.name} is damaged")


def seal(folder: Path) -> None:
    """Records what is in an entry that has just been written."""
    hashes, stamps = {}, {}
    for file in sorted(folder.iterdir()):
        status = file.stat()
        hashes[file.name] = [status.st_size, sha256(file)]
        if status.st_size > ALWAYS_HASHED:
            stamps[file.name] = stamp(status)
    if stamps:
        write_sealed(folder / _STAMPS, stamps)
    write_sealed(folder / _HASHES, hashes)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as recorded when the entry was written."""
    return {name: digest for name, (_, digest) in read_sealed(folder / _HASHES).items()}


def unverified(folder: Path) -> list[str]:
    """The large files of an entry that have been touched since they were last hashed; the others are as written.

    Raises:
        ValueError: one is not as written; the message says which and how.
        OSError: the entry is not there, or cannot be read.
    """
    hashes, stamps, unknown = read_sealed(folder / _HASHES), _stamps(folder), []
    for name, (size, digest) in hashes.items():
        status = _status(folder / name)
        if status.st_size != size:
            raise ValueError(f"{name} has {status.st_size} bytes instead of {size}")
        if size <= ALWAYS_HASHED:
            _compare(folder / name, digest)
        elif stamps.get(name) != stamp(status):
            unknown.append(name)
    return unknown


def verify(folder: Path, names: list[str], *, record: bool) -> None:
    """Hashes files of an entry.

    Args:
        record: keep what was found out, for the next time that the entry is opened.

    Raises:
        ValueError, OSError: as `unverified`.
    """
    hashes = read_sealed(folder / _HASHES)
    stamps = {name: stamp(_status(folder / name)) for name in names}  # as they are before they are read
    for name in names:
        _compare(folder / name, hashes[name][1])
    if record and stamps:
        write_sealed(folder / _STAMPS, _stamps(folder) | stamps)


def _stamps(folder: Path) -> dict[str, list[int]]:
    try:
        return read_sealed(folder / _STAMPS)
    except (OSError, ValueError):
        return {}


def _status(path: Path) -> os.stat_result:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a file")
    return status


def _compare(path: Path, digest: str) -> None:
    if sha256(path) != digest:
        raise ValueError(f"{path.name} holds other bytes than were written")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
