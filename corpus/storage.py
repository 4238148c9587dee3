"""Local files, and objects behind URLs (s3://, gs://, hf://, memory:// and whatever else fsspec knows)."""

import errno
import glob as local_glob
import io
import os
import re
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from corpus.answers import answer

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
BLOCK = 4 * 1024 * 1024
"""Bytes of one request."""
_AHEAD = 4
"""Blocks that are requested ahead of a file that is read in order."""
_ASKED = 32
"""Objects that are asked about at once."""
_PAUSES = (1.0, 4.0)
"""Seconds before a request that failed is repeated."""
_VERSION_FIELDS = [
    "size",
    "ETag",
    "etag",
    "Content-MD5",
    "Digest",
    "checksum",
    "md5",
    "md5Hash",
    "crc32c",
    "sha256",
    "blob_id",
    "xet_hash",
    "generation",
    "version_id",
    "VersionId",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
]
"""Of fsspec's `info`: what the file systems have that changes with the content."""


class NoFileSystem(ValueError):
    """The file system of a URL cannot be used here."""


def is_url(path: str) -> bool:
    """Whether a path names an object and no local file."""
    return bool(_URL.match(path))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        NoFileSystem: the file system is unknown, its package is not installed, or it refuses to be opened.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations, registry

    protocol = url.partition("://")[0]
    if protocol not in known_implementations and protocol not in registry:
        raise NoFileSystem(
            f"{url}: there is no file system {protocol}://; for example s3://, gs:// and hf:// are known"
        )
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise NoFileSystem(f"{url} {_needs_package(protocol, error)}") from error
    except Exception as error:  # whatever a file system raises without credentials or a host
        raise NoFileSystem(f"{url}: {protocol}:// cannot be used: {_reason(url, error)}") from error


def _needs_package(protocol: str, error: ImportError) -> str:
    from fsspec.registry import known_implementations

    package = known_implementations.get(protocol, {"class": ""})["class"].partition(".")[0]
    if package and package != "fsspec" and (error.name or package).partition(".")[0] == package:
        return f"needs the package {package}, which is not installed: .venv/bin/pip install {package}"
    missing = (error.name or package).partition(".")[0]
    hint = f"; install it: .venv/bin/pip install {missing}" if missing else "; install what it needs"
    return f"needs a package that cannot be imported: {error}{hint}"


_ADVICE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or FSSPEC_S3_ANON=1 for public data",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    "hf": "HF_TOKEN, or hf auth login",
}
_ADVICE |= {"s3a": _ADVICE["s3"], "gcs": _ADVICE["gs"]}
_DENIED = re.compile(
    r"credential|denied|forbidden|unauthori[sz]ed|signature|token|\b40[13]\b|permission", re.IGNORECASE
)


def _reason(url: str, error: Exception) -> str:
    """What an exception of a file system says, and what to do about it."""
    protocol = url.partition("://")[0]
    name = type(error).__name__
    said = (isinstance(error, OSError) and error.strerror) or f"{name}: {error}"
    if isinstance(error, ImportError):
        return _needs_package(protocol, error)
    if isinstance(error, PermissionError) or _DENIED.search(f"{name} {error}"):
        where = _ADVICE.get(protocol, f"as {protocol}:// finds them: environment variables, or ~/.config/fsspec")
        said = error.strerror or f"permission denied: {error}" if isinstance(error, PermissionError) else said
        return f"{said}; set credentials ({where})"
    return f"{said}; check the network and the settings of {protocol}:// (~/.config/fsspec)"


@contextmanager
def _requests(url: str) -> Generator[None]:
    """Whatever a file system raises becomes an OSError with a message."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "it does not exist") from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, _reason(url, error)) from error
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        raise OSError(code or errno.EIO, _reason(url, error)) from error


def info(url: str) -> dict[str, Any]:
    """What the file system tells about an object now, not from a listing that it has kept.

    Raises:
        OSError: the object does not exist or cannot be read.
    """
    system, path = filesystem(url)
    with _requests(url):
        system.invalidate_cache(system._parent(path))
        return system.info(path)


def version(url: str) -> dict[str, str]:
    """What changes when an object is replaced: its size and, where the file system has them, ETag, hash and times."""
    found = info(url)
    return {field: str(found[field]) for field in _VERSION_FIELDS if found.get(field) is not None}


class Found(NamedTuple):
    """A file or folder."""

    path: str
    size: int
    """In bytes."""
    is_folder: bool


def find(path: str) -> Found | None:
    """None: it does not exist. Raises OSError."""
    try:
        if is_url(path):
            found = answer("kind", path, lambda: _described(path))
            return None if found is None else Found(*found)
        return Found(path, os.path.getsize(path), os.path.isdir(path))
    except FileNotFoundError:
        return None


def _described(url: str) -> Found | None:
    system, path = filesystem(url)
    try:
        return _found(system, path, info(url))
    except FileNotFoundError:
        return None


def _found(system: Any, path: str, described: dict[str, Any]) -> Found:
    return Found(system.unstrip_protocol(path), int(described["size"] or 0), described["type"] == "directory")


def size(path: str) -> int:
    """In bytes. Raises OSError."""
    return int(info(path)["size"]) if is_url(path) else os.path.getsize(path)


def is_file(path: str) -> bool:
    """Raises OSError if it cannot be found out."""
    if not is_url(path):
        return os.path.isfile(path)
    found = find(path)
    return found is not None and not found.is_folder


Result = TypeVar("Result")


def each(ask: Callable[[str], Result], paths: Sequence[str]) -> list[Result]:
    """`ask` of every path, of URLs in threads, since each waits for an answer."""
    if not any(map(is_url, paths)):
        return list(map(ask, paths))
    contexts = [copy_context() for _ in paths]  # of `corpus.answers`
    with ThreadPoolExecutor(_ASKED) as threads:
        return list(threads.map(lambda context, path: context.run(ask, path), contexts, paths))


def read_bytes(path: str) -> bytes:
    """All of a small file. Raises OSError."""
    with open_binary(path) as file:
        return file.read()


def glob(pattern: str) -> list[Found]:
    """The files and folders that match, sorted. Raises OSError."""
    if not is_url(pattern):
        found = map(find, sorted(local_glob.glob(pattern, recursive=True)))
        return [one for one in found if one is not None]
    return [Found(*one) for one in answer("matches", pattern, lambda: _matching(pattern))]


def _matching(pattern: str) -> list[Found]:
    system, path = filesystem(pattern)
    with _requests(pattern):
        system.invalidate_cache()
        return sorted(_found(system, name, described) for name, described in system.glob(path, detail=True).items())


def files_below(folder: str) -> list[Found]:
    """The files in a folder and in those within it, sorted, without hidden ones (whose names begin with a dot). Raises
    OSError."""
    if is_url(folder):
        return [Found(*one) for one in answer("files", folder, lambda: _below(folder))]
    paths = []
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(at, name) for name in names if not name.startswith(".")]
    return [one for one in map(find, sorted(paths)) if one is not None]


def _below(folder: str) -> list[Found]:
    system, root = filesystem(folder)
    with _requests(folder):
        system.invalidate_cache()
        found = [_found(system, name, described) for name, described in system.find(root, detail=True).items()]
    base = system.unstrip_protocol(root).rstrip("/") + "/"
    return sorted(one for one in found if not _is_hidden(one.path.removeprefix(base)))


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def put(local: Path, target: str) -> None:
    """Moves a file to a path, or uploads it. Raises OSError."""
    if not is_url(target):
        os.rename(local, target)
        return
    system, path = filesystem(target)
    with _requests(target):
        system.put_file(str(local), path)
        system.invalidate_cache(system._parent(path))
    if (written := size(target)) != local.stat().st_size:
        raise OSError(errno.EIO, f"{target} has {written:,} bytes instead of {local.stat().st_size:,}")


def open_binary(path: str) -> BinaryIO:
    """A file to be read; an object is requested in blocks, ahead of what is read in order. Raises OSError."""
    return cast(BinaryIO, ObjectFile(path)) if is_url(path) else open(path, "rb")


def for_arrow(path: str) -> AbstractContextManager[Any]:
    """What pyarrow opens: the path of a local file, or an open object."""
    return ObjectFile(path) if is_url(path) else nullcontext(path)


def repeated(request: Callable[[], Result]) -> Result:
    """The answer to a request, which is repeated twice where it fails. Raises OSError."""
    for pause in _PAUSES:
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return request()


class ObjectRanges:
    """Ranges of an object, from several threads."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, (self._system, self._path) = url, size, filesystem(url)

    def read(self, begin: int, end: int) -> bytes:
        """Raises OSError if the object cannot be read, or ends early."""
        return repeated(lambda: self._request(begin, end))

    def _request(self, begin: int, end: int) -> bytes:
        with _requests(self._url):
            part = self._system.cat_file(self._path, start=begin, end=end)
        if len(part) != end - begin:
            raise OSError(errno.EIO, f"it ends after {begin + len(part):,} of {self._size:,} bytes")
        return part


class ObjectFile(io.RawIOBase):
    """An object that is read in blocks. As long as it is read in order, the next blocks are requested in threads.

    Raises:
        OSError: the object does not exist or cannot be read, ends early, or was replaced while it was read.
    """

    def __init__(self, url: str, *, ahead: int = _AHEAD) -> None:
        self._url, self.version = url, version(url)
        self._size, self._position = int(self.version["size"]), 0
        self._ranges = ObjectRanges(url, self._size)
        self._ahead, self._last = ahead, -1
        self._blocks: dict[int, Future[bytes]] = {}
        self._threads = ThreadPoolExecutor(max(ahead, 1), thread_name_prefix="object")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = max(offset + (0, self._position, self._size)[whence], 0)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer, unless the object ends."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._position < self._size:
            number, offset = divmod(self._position, BLOCK)
            part = self._block(number)[offset : offset + len(view) - done]
            view[done : done + len(part)] = part
            done, self._position = done + len(part), self._position + len(part)
            if self._position == self._size and version(self._url) != self.version:
                raise OSError(errno.EIO, "it was replaced while it was read; start again")
        return done

    def close(self) -> None:
        if not self.closed:
            self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, number: int) -> bytes:
        in_order, self._last = number in (self._last, self._last + 1), number
        wanted = range(number, min(number + 1 + self._ahead * in_order, -(-self._size // BLOCK)))
        self._blocks = {i: block for i, block in self._blocks.items() if i in wanted}
        for i in wanted:
            if i not in self._blocks:
                end = min((i + 1) * BLOCK, self._size)
                self._blocks[i] = self._threads.submit(self._ranges.read, i * BLOCK, end)
        return self._blocks[number].result()
