"""What a process needs before it opens anything: standard streams and file descriptors. Imports nothing heavy."""

import os
import resource
import sys

FEWEST_FILES = 256
"""Open files that one rank needs, generously: gloo opens an epoll instance per process group and a socket per peer."""


def prepare() -> None:
    """Opens standard streams that were closed (`>&-`) on /dev/null, and raises the limit of open files as far as this
    process may.

    Raises:
        ValueError: fewer than FEWEST_FILES files may be open at a time.
    """
    # A file that is opened while descriptor 1 is free becomes standard output, and what C libraries print goes into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False, errors="backslashreplace"))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and (hard == unlimited or soft < hard):
        # Not to the highest values that some systems allow: programs that close all descriptors would take minutes.
        soft = max(soft, 65536 if hard == unlimited else min(hard, 65536))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != unlimited and soft < FEWEST_FILES:
        raise ValueError(
            f"only {soft} files may be open at a time here, and a run needs up to {FEWEST_FILES}: raise the limit with "
            f"`ulimit -n 1024`, or ask the administrator for a higher hard limit (`ulimit -Hn` says {hard})"
        )
