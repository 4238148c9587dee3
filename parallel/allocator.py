"""What the C library's allocator does with freed memory on a CPU.

glibc gives every block of more than 32 MiB, and the end of its heap, back to the kernel when it is freed. A training
step asks for the same blocks again and again: each time the kernel has to find, clear and map their pages, which took
a third of the CPU time of a step.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h: free memory at the heap's end, and the size of a block, from which the kernel gets it back."""
OVERRIDES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> tuple[str, str]:
    """Tells glibc to keep blocks of up to 2 GiB for the next step. Returns (what, why) for the start table. Nothing is
    changed where the C library is another one or where the environment already sets its allocator."""
    mine = [name for name in OVERRIDES if name in os.environ]
    if mine:
        return "as set", f"{mine[0]} is in the environment"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "as the C library does", "it has no mallopt"
    largest = 2**31 - 1  # an int
    if not (mallopt(M_MMAP_THRESHOLD, largest) and mallopt(M_TRIM_THRESHOLD, largest)):
        return "as the C library does", "mallopt refused"
    return "freed blocks are kept", "the kernel need not clear their pages at every step"
