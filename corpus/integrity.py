"""Verifies the files of a cache entry by their sizes and SHA-256, which are stored in the entry."""

import hashlib
import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any

_HASHES = "files.json"
"""Size and SHA-256 of every file of an entry, with a hash of its own. Written last: its existence marks a complete
entry."""
_STAMPS = "verified.json"
"""File system metadata of the large files when they were last hashed."""
ALWAYS_HASHED = 1024 * 1024
"""Bytes. Files up to this size are hashed whenever an entry is opened; larger ones (1.2 GiB/s on one core) once, and
again only if their inode, size, modification or change time differs, so that a start does not read a large corpus."""


def stamp(status: os.stat_result) -> list[int]:
    """Metadata that changes if a file is written to or replaced: unlike the modification time, users cannot set the
    change time. Without the device, since nodes may number the same file system differently."""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """Writes JSON atomically, with a hash by which `read_sealed` detects damage."""
    text = json.dumps(content)
    # Not a process id, which is not unique across nodes.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps({"sha256": _digest(text), "content": content}))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_sealed(path: Path) -> Any:
    """Reads a file written by `write_sealed`.

    Raises:
        ValueError: the file is damaged.
        OSError: the file does not exist or cannot be read.
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
    """Records sizes and hashes of the files of a new entry."""
    hashes, stamps = {}, {}
    for file in sorted(folder.iterdir()):
        if file.name in (_HASHES, _STAMPS):  # of a process that was killed before it renamed the entry
            continue
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
    """The large files of an entry that may have changed since they were last hashed; the others are verified.

    Raises:
        ValueError: a file has changed; the message names it.
        OSError: the entry does not exist or cannot be read.
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
    """Verifies the hashes of files of an entry.

    Args:
        record: whether to save the result, for the next time that the entry is opened.

    Raises:
        ValueError, OSError: as `unverified`.
    """
    hashes = read_sealed(folder / _HASHES)
    stamps = {name: stamp(_status(folder / name)) for name in names}  # before the files are read
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
        raise ValueError(f"{path.name} has different content than was written")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
