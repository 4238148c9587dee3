"""Checks that cache directories whose content is trusted later, such as compiled kernels, are private to this user."""

import os
import stat
from pathlib import Path

ROOT = "~/.cache/switchyard"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Creates a directory and its parents so that only this user can write to them, whatever the umask. Existing
    directories are left unchanged."""
    missing = [path for path in [folder, *folder.parents] if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(mode=0o755, exist_ok=True)


def untrusted_reason(path: Path) -> str | None:
    """Why another user could have written a file or directory, and the command that fixes it; None: only this user or
    root could. Symbolic links are not followed and never trusted.

    Raises:
        OSError: it does not exist or its status cannot be read.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a symbolic link"
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {status.st_uid}); remove it, or have its owner do so"
    if status.st_mode & _OTHERS_WRITE:
        return f"{path} is writable by other users; check its content, then run: chmod go-w {path}"
    return None


def check_private(path: Path, root: Path) -> None:
    """Checks that no other user can write to `path` or to any directory from `root` down to it.

    Raises:
        PermissionError: another user can.
        OSError: one of them does not exist.
    """
    parts = [path, *path.parents]
    for part in reversed(parts[: parts.index(root) + 1]):
        if reason := untrusted_reason(part):
            raise PermissionError(reason)
