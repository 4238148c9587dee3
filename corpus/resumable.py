"""A folder for work that a process may be killed at, and the next one continues."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus.integrity import read_sealed, write_sealed

_LOCK, _WORK = "lock", "work.json"


@contextlib.contextmanager
def resumable_folder(folder: Path, work: Any) -> Iterator[Path]:
    """Context manager of a folder that has what a killed or interrupted process has left of the same work, or nothing.
    It is removed at the end and after an error; after Ctrl-C or SIGKILL it stays.

    Args:
        work: everything that the result depends on, JSON-serialisable.

    Raises:
        ValueError: another process uses the folder.
    """
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as lock:  # released when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to {folder}; wait for it, or choose another output") from None
        try:
            if _left(folder) != work:
                for path in folder.iterdir():
                    if path.name != _LOCK:
                        path.unlink()
                write_sealed(folder / _WORK, work)
            yield folder
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(folder)


def _left(folder: Path) -> Any:
    try:
        return read_sealed(folder / _WORK)
    except (OSError, ValueError):
        return None
