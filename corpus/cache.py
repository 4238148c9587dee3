"""The on-disk cache: entries, which are directories that are created atomically, and facts about files."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from corpus import integrity
from parallel import file_lock
from parallel.cache_dir import ROOT, make_private, untrusted_reason

_CLOCK_TICK_NS = 20_000_000
"""Longer than the time resolution of file systems: changes further apart than this have different timestamps."""


class ReadOnlyCache(ValueError):
    """The entry is not in the cache, and this user cannot write to it."""


class Cache:
    """A cache that several processes, nodes and users can share. Users without write permission can read the entries of
    others."""

    def __init__(
        self,
        cache_dir: str,
        note: Callable[[str], None] = lambda text: None,
        *,
        timeout: float = 600.0,
        waiting: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Creates the directory if it does not exist.

        Args:
            note: called with messages for the user, such as that a damaged entry was rebuilt.
            timeout, waiting: for another process that builds an entry, as in parallel/file_lock.py.

        Raises:
            ValueError: the directory cannot be created or read.
        """
        self._folder = Path(cache_dir).expanduser().absolute()
        self._note = note
        self._timeout, self._waiting = timeout, waiting
        try:
            make_private(self._folder)
            os.listdir(self._folder)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir {self._folder} cannot be used: {error.strerror}; "
                "set data.cache_dir to a folder that can be written to"
            ) from None
        # A directory that the user chose may be shared deliberately; the default one in the home directory is not.
        if self._folder == Path(ROOT).expanduser() and (reason := untrusted_reason(self._folder)):
            note(f"tokenizers and token files are not safe from other users: {reason}")
        self.writable = os.access(self._folder, os.W_OK | os.X_OK)
        self._facts_path = self._folder / "facts.json"
        self._facts = self._read_facts()
        self._facts_changed = False

    def entry(self, kind: str, key: Any, build: Callable[[Path], None], *, resume: bool = False) -> Path:
        """The directory of an entry, which is built if it does not exist.

        `build` fills an empty directory, which is renamed once it is complete. If several processes need the entry, one
        builds it and the others wait. An entry whose files have changed is rebuilt, with a note.

        Args:
            kind: the subdirectory for entries of this kind.
            key: everything that the content depends on, JSON-serialisable.
            resume: whether `build` continues what a process that was killed or interrupted has left in the directory,
                instead of getting an empty one.

        Raises:
            ReadOnlyCache: the entry does not exist, or is damaged, and the cache cannot be written to.
            ValueError: the file system has no locks, or no space is left.
            LockTimeout: the process that builds the entry does not respond.
        """
        place = self._place(kind, key)
        with suppress(OSError, ValueError):
            if not integrity.unverified(place):
                return place  # without a lock, which needs write permission
        if not os.access(_nearest_folder(place.parent), os.W_OK | os.X_OK):
            if damage := _damage(place, record=False):
                raise ReadOnlyCache(
                    f"{place} {damage}, and data.cache_dir {self._folder} cannot be written to; "
                    "set data.cache_dir to a folder that can"
                )
            return place
        try:
            _make_shared(place.parent)
            with self._locked(place.with_suffix(".lock")):
                if damage := _damage(place, record=True):
                    if place.exists() and damage != _MISSING:
                        self._note(f"{place} {damage}; it was rebuilt")
                    _build(place, build, resume=resume)
        except OSError as error:
            elsewhere = error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(self._folder)
            if error.errno not in _NOT_WRITABLE or elsewhere:
                raise
            raise ValueError(
                f"data.cache_dir {self._folder} cannot be written to: {error.strerror}"
                f"{f' ({error.filename})' if error.filename else ''}; set data.cache_dir to a folder that can"
            ) from error
        return place

    def has(self, kind: str, key: Any) -> bool:
        """Whether there is an entry, which may be damaged. Arguments as of `entry`."""
        return self._place(kind, key).is_dir()

    def _place(self, kind: str, key: Any) -> Path:
        return self._folder / kind / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            lock = os.open(path, os.O_RDONLY)  # created by another user before the directory was shared
        with ExitStack() as stack:
            stack.callback(os.close, lock)  # this releases the lock
            shared = path.parent.stat().st_mode & 0o22
            if os.fstat(lock).st_uid == os.geteuid() and shared:
                os.fchmod(lock, 0o644 | shared)
            try:
                stack.enter_context(file_lock.hold_lock(lock, path, timeout=self._timeout, waiting=self._waiting))
            except TimeoutError:
                raise
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be locked ({error.strerror}); "
                    "set data.cache_dir to a folder of yours on a file system that has file locks"
                ) from None
            yield

    def fact(self, path: str, name: str, compute: Callable[[str], Any]) -> Any:
        """The JSON-serialisable result of `compute(path)` for a file's content, cached under the file's path, inode,
        size, modification and change time, so that later starts need not read the file again.

        Raises:
            ValueError: the file cannot be read.
        """
        try:
            status = os.stat(path)
            if 0 <= time.time_ns() - status.st_ctime_ns < _CLOCK_TICK_NS:
                time.sleep(_CLOCK_TICK_NS / 1e9)  # so that a later edit changes the timestamp
                status = os.stat(path)
            key = f"{name} {os.path.abspath(path)} {' '.join(map(str, integrity.stamp(status)))}"
            if key not in self._facts:
                self._facts[key] = compute(path)
                self._facts_changed = True
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        return self._facts[key]

    def sha256(self, path: str) -> str:
        """Hexadecimal SHA-256 of a file, cached."""
        return self.fact(path, "sha256", integrity.sha256)

    def recall(self, name: str) -> Any:
        """What was remembered under a name; None: nothing."""
        return self._facts.get(name)

    def remember(self, name: str, value: Any) -> None:
        """Keeps a JSON-serialisable value with the facts about files."""
        if self._facts.get(name) != value:
            self._facts[name] = value
            self._facts_changed = True

    def save_facts(self) -> None:
        """Saves the facts about files, if possible. If two processes save at once, the facts of one may be lost; they
        are recomputed when they are needed."""
        if self._facts_changed and self.writable:
            with suppress(OSError):
                integrity.write_sealed(self._facts_path, self._facts)

    def _read_facts(self) -> dict[str, Any]:
        try:
            return integrity.read_sealed(self._facts_path)
        except (OSError, ValueError):
            return {}  # they can be recomputed


_MISSING = "is not there"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _damage(place: Path, *, record: bool) -> str | None:
    """What is wrong with an entry, after reading all files that changed since they were last read. None: nothing."""
    try:
        integrity.verify(place, integrity.unverified(place), record=record)
        return None
    except FileNotFoundError:
        return _MISSING
    except ValueError as error:
        return f"is damaged ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _build(place: Path, build: Callable[[Path], None], *, resume: bool) -> None:
    partial = place.with_suffix(".partial")
    for leftover in (place,) if resume else (partial, place):  # of a process that died; the lock excludes others
        if leftover.exists():
            shutil.rmtree(leftover)
    _make_shared(partial)
    try:
        build(partial)
        integrity.seal(partial)
    except BaseException as error:
        if not resume or isinstance(error, Exception):  # not a signal
            shutil.rmtree(partial, ignore_errors=True)
        raise
    os.rename(partial, place)


def _nearest_folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _make_shared(folder: Path) -> None:
    """Creates a directory with the write permissions of its parent, independent of the umask."""
    if not folder.is_dir():
        folder.mkdir(mode=0o755, exist_ok=True)
        shared = folder.parent.stat().st_mode & 0o1022  # including the sticky bit
        if shared & ~folder.stat().st_mode:
            folder.chmod(folder.stat().st_mode & 0o7777 | shared)
