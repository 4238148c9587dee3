"""Folders whose content is executed or believed later, such as compiled kernels: who else could have written them."""

import os
import stat
from pathlib import Path

ROOT = "~/.cache/switchyard"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Creates a folder, with its parents, that nobody but this user can write to, whatever the umask. One that exists
    is left as it is."""
    missing = [path for path in [folder, *folder.parents] if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(mode=0o755, exist_ok=True)


def untrusted_reason(path: Path) -> str | None:
    """Why somebody else could have written a file or folder, and what mends it; None: only this user or root could.
    A symbolic link is judged by itself: it is never trusted.

    Raises:
        OSError: it does not exist or cannot be looked at.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a symbolic link"
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {status.st_uid}); remove it, or have its owner do so"
    if status.st_mode & _OTHERS_WRITE:
        return f"{path} can be written by other users; after a look at what is in it: chmod go-w {path}"
    return None


def check_private(path: Path, root: Path) -> None:
    """Of a path inside `root`: neither it nor any folder from `root` down to it can be written by another user.

    Raises:
        PermissionError: one can.
        OSError: one does not exist.
    """
    parts = [path, *path.parents]
    for part in reversed(parts[: parts.index(root) + 1]):
        if reason := untrusted_reason(part):
            raise PermissionError(reason)
