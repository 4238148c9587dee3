"""Objects behind URLs as data: what identifies their content, and copies of token files in the cache.

Text is read where it is and only its tokens are kept. Token files are copied as a whole before the first step: their
samples are shuffled over the whole file, and hashes and ids are checked before they are trained on. A step of training
therefore never waits for the network.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from corpus import storage
from corpus.answers import answer
from corpus.cache import Cache

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
    return storage.each(lambda path: _explained(path, storage.size), paths)


def check_unchanged(path: str, content: str | None) -> None:
    """Raises ValueError if an object is no longer the one whose `content_id` was `content`, or cannot be asked."""
    if content is not None and storage.is_url(path) and repr(_explained(path, storage.version)) != content:
        raise ValueError(f"{path} was replaced while it was read; start again")


def local_pairs(prefixes: list[str], cache: Cache, progress: Callable[[str, float], None]) -> list[str]:
    """The prefixes of token files, of which those that are URLs are copied into the cache. An object that was replaced
    is copied again.

    Args:
        progress: called with the current activity and the fraction of it that is done.

    Raises:
        ValueError: an object cannot be read, ends early or is replaced meanwhile; or as Cache.entry.
    """
    return [_local_pair(prefix, cache, progress) if storage.is_url(prefix) else prefix for prefix in prefixes]


def _local_pair(prefix: str, cache: Cache, progress: Callable[[str, float], None]) -> str:
    if prefix.endswith((".bin", ".idx")):
        raise ValueError(f"{prefix}: give the prefix only: {prefix[:-4]}")
    name = prefix.rstrip("/").rpartition("/")[2]
    versions = {suffix: _version(prefix + suffix) for suffix in (".idx", ".bin")}

    def build(folder: Path) -> None:
        for suffix, version in versions.items():
            _copy(prefix + suffix, folder / f"{name}{suffix}", version, progress)

    return str(cache.entry("objects", [prefix, versions], build) / name)


def _version(url: str) -> dict[str, str]:
    return _explained(url, lambda url: answer("version", url, lambda: storage.version(url)))


def _explained(url: str, ask: Callable[[str], Result]) -> Result:
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
