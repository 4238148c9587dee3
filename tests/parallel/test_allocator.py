"""What a CPU run tells the C library's allocator, in processes of their own: it cannot be taken back."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from parallel.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory()[0])
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**24) for _ in range(3)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(10)))
"""


def run(how: str, **environment: str) -> list[str]:
    names = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    env = {k: v for k, v in os.environ.items() if k not in names} | environment
    command = [sys.executable, "-c", FAULTS, how]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_blocks_of_64_MiB_cost_no_page_fault_in_the_end() -> None:
    (as_it_is,) = run("as it is")
    said, kept = run("kept")
    assert said == "malloc keeps freed blocks"
    assert int(as_it_is) >= 96  # 3 * 64 MiB in pages of at most 2 MiB
    assert int(kept) < 10


def test_an_allocator_that_is_already_set_is_left_alone() -> None:
    assert run("kept", MALLOC_MMAP_MAX_="7")[0] == "malloc as configured"
