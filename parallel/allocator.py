"""Configures glibc's malloc for training on a CPU.

By default glibc returns every freed block of more than 32 MiB, and the end of its heap, to the kernel. A training step
allocates the same blocks again and again, and each time the kernel has to clear and map their pages. That took a third
of the CPU time of a step.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from glibc's malloc.h: the amount of free memory at the end of the heap, and the size of a
block, above which memory is returned to the kernel."""
OVERRIDES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> tuple[str, str]:
    """Configures glibc to keep freed blocks of up to 2 GiB. Does nothing with another C library, or where the
    environment configures the allocator. Returns (setting, reason) for the start table."""
    mine = [name for name in OVERRIDES if name in os.environ]
    if mine:
        return "malloc as configured", f"{mine[0]} is set in the environment"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "malloc default", "the C library has no mallopt"
    largest = 2**31 - 1  # of a C int
    if not (mallopt(M_MMAP_THRESHOLD, largest) and mallopt(M_TRIM_THRESHOLD, largest)):
        return "malloc default", "mallopt failed"
    return "malloc keeps freed blocks", "avoids clearing their pages at every step"
