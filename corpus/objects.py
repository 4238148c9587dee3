"""Objects behind URLs as data: what identifies their content, and token files in the cache.

Text is read where it is and only its tokens are kept. Of token files the index is copied before the first step; their
tokens are either read by blocks (`corpus/object_blocks.py`), or copied as a whole as well.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from corpus import storage
from corpus.answers import answer
from corpus.cache import Cache, ReadOnlyCache
from corpus.object_blocks import describe, described, is_complete

_REQUESTS = 8
"""Blocks that are requested at once."""
_POLL_SECONDS = 0.5
Result = TypeVar("Result")


def hash_files(paths: list[str], cache: Cache, progress: Callable[[str, float], None]) -> None:
    """Computes the hashes of local files that the cache does not have, in threads.

    Raises:
        ValueError: a file cannot be read.
    """
    pool = ThreadPoolExecutor()  # hashing releases the GIL
    try:
        hashing = [pool.submit(cache.sha256, path) for path in paths]
        for number, future in enumerate(hashing):
            while not wait([future], _POLL_SECONDS).done:
                progress("hashing files", number / len(paths))  # raises if a stop was requested
            future.result()
            progress("hashing files", (number + 1) / len(paths))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def content_id(path: str, cache: Cache) -> str:
    """What differs for files with other content: the SHA-256 of a local file, the version of an object.

    Raises:
        ValueError: it cannot be read.
    """
    return repr(_version(path)) if storage.is_url(path) else cache.sha256(path)


def sizes_of(paths: Sequence[str]) -> list[int]:
    """In bytes, of files and objects. Raises ValueError if one cannot be asked for it."""
    return storage.each(lambda path: explained(path, storage.size), paths)


def check_unchanged(path: str, content: str | None) -> None:
    """Raises ValueError if an object is no longer the one whose `content_id` was `content`, or cannot be asked."""
    if content is not None and storage.is_url(path) and repr(explained(path, storage.version)) != content:
        raise ValueError(f"{path} was replaced while it was read; start again")


def local_pairs(
    prefixes: list[str], cache: Cache, progress: Callable[[str, float], None], *, stream: bool
) -> list[str]:
    """The prefixes of token files, those that are URLs by their place in the cache. An object that was replaced has
    another place.

    Args:
        progress: called with the current activity and the fraction of it that is done.
        stream: whether a .bin is read by blocks, unless it was copied before, instead of being copied.

    Raises:
        ValueError: an object cannot be read, ends early or is replaced meanwhile; or as Cache.entry.
    """
    return [_local_pair(p, cache, progress, stream=stream) if storage.is_url(p) else p for p in prefixes]


def _local_pair(prefix: str, cache: Cache, progress: Callable[[str, float], None], *, stream: bool) -> str:
    if prefix.endswith((".bin", ".idx")):
        raise ValueError(f"{prefix}: give the prefix only: {prefix[:-4]}")
    name = prefix.rstrip("/").rpartition("/")[2]
    versions = {suffix: _version(prefix + suffix) for suffix in (".idx", ".bin")}

    def build(folder: Path) -> None:
        for suffix, version in versions.items():
            if stream and suffix == ".bin":
                describe(folder / name, prefix + suffix, version)
            else:
                _copy(prefix + suffix, folder / f"{name}{suffix}", version, progress)

    stream = stream and not cache.has("objects", [prefix, versions])
    place = str(cache.entry("streams" if stream else "objects", [prefix, versions], build) / name)
    if stream and not os.access(Path(place).parent, os.W_OK) and not is_complete(place):
        raise ReadOnlyCache(
            f"{prefix}.bin is not yet whole in {Path(place).parent}, which cannot be written to; set data.cache_dir to "
            "a folder that can"
        )
    return place


def content_of_pair(prefix: str, cache: Cache) -> list[str]:
    """What identifies the content of a pair. Of an object its version is known, not its hash."""
    streamed = described(prefix)
    return [cache.sha256(prefix + ".idx"), repr(streamed.version) if streamed else cache.sha256(prefix + ".bin")]


def _version(url: str) -> dict[str, str]:
    return explained(url, lambda url: answer("version", url, lambda: storage.version(url)))


def explained(url: str, ask: Callable[[str], Result]) -> Result:
    """What `ask` returns for a URL. Raises ValueError instead of OSError."""
    try:
        return ask(url)
    except OSError as error:
        raise ValueError(f"{url} cannot be read: {error.strerror}") from error


def _copy(url: str, path: Path, version: dict[str, str], progress: Callable[[str, float], None]) -> None:
    done, size = 0, int(version["size"])
    with path.open("wb") as file:
        for block in _blocks(url, version):
            file.write(block)  # an OSError here is one of the cache
            done += len(block)
            progress(f"copying {url}", done / size)


def _blocks(url: str, version: dict[str, str]) -> Iterator[bytes]:
    try:
        with storage.ObjectFile(url, ahead=_REQUESTS) as source:
            if source.version != version:
                raise ValueError(f"{url} was replaced meanwhile; start again")
            while block := source.read(storage.BLOCK):
                yield block
    except OSError as error:
        raise ValueError(f"{url} cannot be read: {error.strerror}") from error
