"""Compiles every Triton kernel, in processes beside each other: the stages after this one find them in the cache."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.gpu.stages import cases
from tests.gpu.stages.common import REHEARSE, emit, synchronize

PROCESSES = 2 if REHEARSE else 16
SECONDS = 75.0


def compile_one(name: str) -> tuple[str, float, str]:
    begin = time.monotonic()
    command = [sys.executable, "-m", "tests.gpu.stages.warmup", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        failed = said[-1][:300] if done.returncode else ""
        if failed:
            print(name, done.stderr[-4000:], sep="\n", flush=True)
    except subprocess.TimeoutExpired:
        failed = f"not compiled within {SECONDS:.0f} s"
    return name, time.monotonic() - begin, failed


def main() -> None:
    names = list(cases.cases())[: 2 if REHEARSE else None]
    with ThreadPoolExecutor(PROCESSES) as pool:
        for name, seconds, failed in pool.map(compile_one, names):
            emit(name, seconds=round(seconds, 1), **({"error": failed} if failed else {}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        cases.KERNELS_ONLY = True
        cases.cases()[sys.argv[1]][0]()
        synchronize()  # a process that ends with work under way may be aborted
    else:
        main()
