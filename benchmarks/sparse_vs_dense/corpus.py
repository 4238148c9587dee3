"""A corpus large enough not to repeat, from the text that a machine carries: sources and documentation of Python, of
the installed packages and of the system. Files of equal content count once."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.run_files import write_atomically

SMALLEST, LARGEST = 256, 2**17
"""Bytes of a file. Shorter ones are mostly empty modules; longer ones, often tables and generated code, would each be
a large part of the held-out text."""
_TEXT = (".md", ".rst", ".txt")
_LICENCES = ("license", "licence", "copying", "notice", "copyright", "authors")
_LOGS = ("changelog", "changes", "news", "readme", "history")
_PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Place:
    """A folder tree of text."""

    name: str
    root: Path
    suffixes: tuple[str, ...] = (".py", *_TEXT)
    without: tuple[str, ...] = ("__pycache__",)
    """Names of subfolders that are left out."""


def places() -> list[Place]:
    """Where this machine has text; folders that do not exist are left out."""
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    found = [Place("standard library", Path(sysconfig.get_path("stdlib")), without=("__pycache__", *_PACKAGES))]
    found += [Place("installed packages", Path(path)) for path in packages]
    found += [
        Place("system packages", Path("/usr/lib/python3")),
        Place("system documentation", Path("/usr/share/doc"), _TEXT),
        Place("licences", Path("/usr/share/common-licenses"), _TEXT),
    ]
    return [place for place in found if place.root.is_dir()]


def list_files(place: Place) -> Iterator[Path]:
    """Its text files, sorted; symbolic links are not followed. Licences and change logs count without a suffix, and
    compressed (.gz) too."""
    for folder, subfolders, names in os.walk(place.root):
        subfolders[:] = sorted(name for name in subfolders if name not in place.without)
        for name in sorted(names):
            path, plain = Path(folder, name), name.removesuffix(".gz").lower()
            if (plain.endswith(place.suffixes) or plain.startswith((*_LICENCES, *_LOGS))) and not path.is_symlink():
                yield path


def read_text(path: Path) -> str | None:
    """The text of a file; None: it cannot be read, is too short or too long, or is not UTF-8 text."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error):
        return None
    if not SMALLEST <= len(content) <= LARGEST or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _order(place: Place, path: Path) -> bytes:
    return hashlib.blake2b(f"{place.name}/{path.relative_to(place.root)}".encode(), digest_size=16).digest()


def select(found: Sequence[Place], max_bytes: int, account: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name of the place, text) of each text, in the order of a hash of the file's name, so that any number of texts
    from the first is a random sample of all. No more is read than is needed.

    Args:
        max_bytes: the texts end before this size is exceeded.
        account: is filled with what was taken, by place, and what was left out.
    """
    files = sorted((_order(place, path), place.name, path) for place in found for path in list_files(place))
    account |= {"bytes": 0, "files": len(files), "file_bytes": sum(path.stat().st_size for _, _, path in files)}
    account |= {"duplicates": 0, "unusable": 0, "places": {}}
    seen: set[bytes] = set()
    for _, name, path in files:
        text = read_text(path)
        if text is None:
            account["unusable"] += 1
            continue
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in seen:
            account["duplicates"] += 1
            continue
        if account["bytes"] + len(content) > max_bytes:
            return
        seen.add(digest)
        of = account["places"].setdefault(name, {"files": 0, "bytes": 0})
        of["files"] += 1
        of["bytes"] += len(content)
        account["bytes"] += len(content)
        yield name, text


def write_corpus(path: Path, found: Sequence[Place], max_bytes: int) -> dict[str, Any]:
    """Writes a .jsonl.gz with a row per text, with the same bytes for the same files. Returns the account of `select`.

    Raises:
        ValueError: there is no text.
    """
    account: dict[str, Any] = {}
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=3, fileobj=raw, mtime=0) as file:
        for name, text in select(found, max_bytes, account):
            file.write((json.dumps({"text": text, "place": name}) + "\n").encode())
    if not account["bytes"]:
        aside.unlink()
        where = ", ".join(str(place.root) for place in found) or "the known folders"
        raise ValueError(f"no text of at most {max_bytes / 1e6:.3g} MB in {where}; nearest: --corpus FILE.jsonl")
    aside.rename(path)
    write_atomically(account_of(path), json.dumps(account, indent=1).encode())
    return account


def account_of(path: Path) -> Path:
    """The file beside a corpus that says what is in it."""
    return path.with_name(path.name.split(".")[0] + ".account.json")


def describe(account: dict[str, Any]) -> str:
    """How many MB are from where, in a line."""
    parts = [
        f"{name} {of['bytes'] / 1e6:.1f} MB ({of['files']:,} files)" for name, of in sorted(account["places"].items())
    ]
    return (
        f"corpus: {account['bytes'] / 1e6:.1f} MB, of {account['files']:,} files of {account['file_bytes'] / 1e6:.0f} "
        f"MB on disk: {', '.join(parts)}; left out on the way: {account['duplicates']:,} duplicates, "
        f"{account['unusable']:,} that are no UTF-8 text of {SMALLEST} B to {LARGEST // 2**10} KiB"
    )
