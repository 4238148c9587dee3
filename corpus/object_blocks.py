"""Token files behind URLs that are read by blocks, which are requested ahead of the samples that need them and kept.

Beside NAME.idx, a folder of the cache has

    NAME.object   the URL of NAME.bin, and its version
    NAME.blocks   its blocks in their places, with holes where none has arrived
    NAME.sums     the checksum of each block, uint32 [N]; 0: it has not arrived

A checksum is written after its block and verified before the block is first used by a process. So a block that was
written partly, because a process was killed or a node lost power, is requested again. Processes share what has arrived.
"""

import errno
import fcntl
import json
import os
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from corpus import storage

OBJECT = ".object"
BLOCK = 256 * 1024
"""Bytes of a block: samples are shuffled, and each of the first ones needs a block of its own. A multiple of the size
of every type of ids."""
_REQUESTS = 16
"""Blocks that are requested at once."""
_SUM = 4
"""Bytes of a checksum."""


class Described(NamedTuple):
    """What is known of an object without asking for it."""

    url: str
    version: dict[str, str]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self.version["size"])


def describe(prefix: Path, url: str, version: dict[str, str]) -> None:
    """Writes PREFIX.object."""
    prefix.with_name(prefix.name + OBJECT).write_text(json.dumps([url, version]))


def described(prefix: str) -> Described | None:
    """The object of which PREFIX keeps blocks. None: PREFIX.bin is a file."""
    try:
        return Described(*json.loads(Path(prefix + OBJECT).read_text()))
    except FileNotFoundError:
        return None


def bin_size(prefix: str) -> int:
    """Bytes of PREFIX.bin, which may be an object. Raises OSError."""
    found = described(prefix)
    return os.path.getsize(prefix + ".bin") if found is None else found.size


def is_complete(prefix: str) -> bool:
    """Whether all blocks of PREFIX have arrived."""
    try:
        sums = memoryview(Path(prefix + ".sums").read_bytes()).cast("I")
    except FileNotFoundError:
        return False
    return len(sums) > 0 and all(sums)


class ObjectBlocks:
    """The blocks of an object. For one thread."""

    def __init__(self, prefix: str) -> None:
        found = described(prefix)
        assert found is not None
        self.url, self._version, self._size = found.url, found.version, found.size
        count = -(-self._size // BLOCK)
        self._writable = os.access(Path(prefix).parent, os.W_OK)
        self._file = _open(prefix + ".blocks", self._size, self._writable)
        self._sums = _open(prefix + ".sums", count * _SUM, self._writable)
        self._verified = bytearray(count)
        """1 for each block whose checksum has been compared."""
        self._requested: dict[int, Future[None]] = {}
        """Blocks that were requested and not read since then."""
        self._confirming, self._confirmed = threading.Lock(), -1.0
        self._threads = _Threads(_REQUESTS)
        weakref.finalize(self, _close, self._threads, self._file, self._sums).atexit = False  # threads may be writing

    def request(self, begin: int, end: int) -> None:
        """Requests the blocks of a range of bytes that have not arrived, without waiting for them."""
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            if not self._verified[number] and number not in self._requested:
                self._requested[number] = self._threads.submit(lambda number=number: self._get(number))

    def read(self, begin: int, end: int) -> bytes:
        """A range of bytes, after waiting for its blocks.

        Raises:
            OSError: they cannot be read, or the object was replaced.
        """
        self.request(begin, end)
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            self._wait_for(number)
        return _read(self._file, begin, end)

    def _wait_for(self, number: int) -> None:
        requested = self._requested.pop(number, None)
        if requested is not None and requested.exception() is not None:
            self._get(number)  # what failed some steps ago may work now

    def _get(self, number: int) -> None:
        """Requests a block, unless it is there."""
        with self._one_process(number):
            if self._is_kept(number):
                return
            if not self._writable:
                raise OSError(errno.EACCES, "data.cache_dir cannot be written to; set it to a folder that can")
            begin, end = number * BLOCK, min((number + 1) * BLOCK, self._size)
            content = self._ranges.read(begin, end)
            self._confirm(time.monotonic())
            _write(self._file, content, begin)
            _write(self._sums, _checksum(number, content), number * _SUM)
            self._verified[number] = True

    @cached_property
    def _ranges(self) -> storage.ObjectRanges:
        return storage.ObjectRanges(self.url, self._size)

    @contextmanager
    def _one_process(self, number: int) -> Iterator[None]:
        """The ranks of a node that need the same block wait for the one that has requested it. Without locks, or where
        the system takes requests of several threads for a deadlock, they request it too, which is only slower."""
        how = number * _SUM, os.SEEK_SET
        with suppress(OSError):
            fcntl.lockf(self._sums, fcntl.LOCK_EX, _SUM, *how)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.lockf(self._sums, fcntl.LOCK_UN, _SUM, *how)

    def _is_kept(self, number: int) -> bool:
        if not self._verified[number]:
            recorded = os.pread(self._sums, _SUM, number * _SUM)
            if not any(recorded):
                return False
            content = _read(self._file, number * BLOCK, min((number + 1) * BLOCK, self._size))
            self._verified[number] = recorded == _checksum(number, content)
        return bool(self._verified[number])

    def _confirm(self, after: float) -> None:
        """Asks for the version, unless it was asked for since a time. Raises OSError if it is another."""
        with self._confirming:
            if self._confirmed < after:
                now = time.monotonic()
                if storage.repeated(lambda: storage.version(self.url)) != self._version:
                    raise OSError(errno.EIO, "it was replaced while it was read; start again")
                self._confirmed = now


def _checksum(number: int, content: bytes) -> bytes:
    """Never 0."""
    return (zlib.crc32(content, number + 1) or 1).to_bytes(_SUM, "little")


def _open(path: str, size: int, writable: bool) -> int:
    """A descriptor of a file that has a size, at first with holes."""
    if not writable:
        return os.open(path, os.O_RDONLY)
    shared = os.stat(os.path.dirname(path)).st_mode & 0o22
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644 | shared)
    status = os.fstat(file)
    if status.st_uid == os.geteuid() and status.st_mode & 0o22 != shared:
        os.fchmod(file, 0o644 | shared)  # whatever the umask is
    if status.st_size != size:
        os.ftruncate(file, size)
    return file


def _read(file: int, begin: int, end: int) -> bytes:
    content = b""
    while len(content) < end - begin:
        part = os.pread(file, end - begin - len(content), begin + len(content))
        if not part:
            raise OSError(errno.EIO, "its blocks in data.cache_dir were truncated while they were in use; start again")
        content += part
    return content


def _write(file: int, content: bytes, begin: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], begin + done)


class _Threads:
    """Daemon threads: one that storage does not answer ends with the process, which a ThreadPoolExecutor waits for."""

    def __init__(self, most: int) -> None:
        self._work: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._most, self._count = most, 0

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._work.put((future, work))
        if self._count < self._most:
            self._count += 1
            threading.Thread(target=self._run, name="blocks", daemon=True).start()
        return future

    def close(self) -> None:
        for _ in range(self._count):
            self._work.put(None)

    def _run(self) -> None:
        while (taken := self._work.get()) is not None:
            future, work = taken
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del taken, work  # so that what is not used any more can be closed


def _close(threads: _Threads, *files: int) -> None:
    threads.close()
    for file in files:
        os.close(file)
