"""Sets up standard streams and the limit of open files of a process. Imports nothing heavy."""

import os
import resource
import sys

MIN_OPEN_FILES = 256
"""Open files that a rank may need: gloo opens an epoll instance per process group and a socket per peer."""


def prepare() -> None:
    """Opens closed standard streams (`>&-`) on /dev/null, and raises the limit of open files as far as the hard limit
    allows.

    Raises:
        ValueError: the limit is lower than MIN_OPEN_FILES.
    """
    # Otherwise the next opened file would become standard output, and C libraries would print into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False, errors="backslashreplace"))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and (hard == unlimited or soft < hard):
        # Not higher: programs that close all descriptors would take minutes.
        soft = max(soft, 65536 if hard == unlimited else min(hard, 65536))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != unlimited and soft < MIN_OPEN_FILES:
        raise ValueError(
            f"the limit of open files is {soft}, but a run needs up to {MIN_OPEN_FILES}: raise it with "
            f"`ulimit -n 1024`, or ask the administrator for a higher hard limit (`ulimit -Hn` says {hard})"
        )
