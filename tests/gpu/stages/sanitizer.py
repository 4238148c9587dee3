"""compute-sanitizer's memcheck over one small call of each kernel, if time is left."""

import functools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.gpu.stages.common import REHEARSE, attempt, emit

NAMES = ("bf16 experts", "blockwise experts", "rows", "norm", "rotary", "loss", "router, softmax")


TOOL = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def check(name: str) -> dict[str, object]:
    assert TOOL is not None
    command = [TOOL, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "tests.gpu.stages.sanitizer", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=45)
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return {"exit_code": done.returncode, "summary": summary[-1] if summary else done.stdout[-200:]}


def main() -> None:
    if TOOL is None:
        emit("compute-sanitizer", error="it is not installed here")
        return
    with ThreadPoolExecutor(len(NAMES)) as pool:
        for name in NAMES:
            pool.submit(attempt, name, functools.partial(check, name))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from tests.gpu.stages import cases, common

        common.REHEARSE = cases.REHEARSE = True  # the small shapes, on the device that is there
        cases.SHAPES.clear()
        cases.SHAPES["tiny"] = (4, 128, 128)
        found = cases.cases()
        name = next(key for key in found if key.startswith(sys.argv[1]))
        found[name][0]()
    elif not REHEARSE:
        main()
    else:
        emit("compute-sanitizer", error="there is no GPU to look at")
