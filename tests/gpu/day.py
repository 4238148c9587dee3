"""`python -m tests.gpu.day --out FOLDER`: what the documents want to know of one GPU, in a quarter of an hour.

Each stage is a process of its own with a deadline of its own and appends one line of JSON to FOLDER/day.jsonl for every
result, flushed at once, so that what was measured survives whatever happens next. A stage that fails, hangs or lacks a
package never stops the following ones. `--rehearse` runs every stage with tiny shapes where there is no GPU. Imports
nothing heavy; tests/gpu/README.md says how its lines become the tables of the documents."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "ceilings": 30,
    "warmup": 65,
    "correctness": 60,
    "te": 60,
    "gemm": 45,
    "steps": 240,
    "train": 120,
    "ranks": 90,
    "sanitizer": 60,
    "rates": 80,
    "whole": 170,
}
"""In order, with the seconds after which each is ended. All of them together are bounded by --seconds."""
GRACE = 5.0
"""Seconds between asking a stage to end and killing its processes."""
LEAST = 10.0
"""Seconds that have to be left for a further stage to be begun."""


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One line, written at once: a reader sees whole lines, even after a kill."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines, in order; one that a kill has torn is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def run_stage(name: str, out: Path, deadline: float, *, rehearse: bool, command: list[str] | None = None) -> str:
    """done, failed or out of time; written down with the last of what the stage said.

    Args:
        deadline: seconds.
        command: None: the module of that name in tests.gpu.stages.
    """
    command = command or [sys.executable, "-m", f"tests.gpu.stages.{name}"]
    environment = os.environ | {"DAY_OUT": str(out), "DAY_STAGE": name, "PYTHONUNBUFFERED": "1"}
    if rehearse:
        environment |= {"DAY_REHEARSE": "1", "TRITON_INTERPRET": "1"}
    started, log = time.monotonic(), out / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(deadline)
            how = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            how = f"out of time after {deadline:.0f} s"
        finally:
            end(process)
    said = "" if how == "done" else log.read_bytes()[-1500:].decode(errors="replace")
    seconds = round(time.monotonic() - started, 1)
    append(out / "day.jsonl", {"stage": name, "status": how, "seconds": seconds, "said": said})
    print(f"{name:12} {seconds:6.1f} s  {how}", flush=True)
    return how


def end(process: subprocess.Popen) -> None:
    """Ends a stage and all that it has started."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every stage was done, else 1: the lines are there either way."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.day", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder that day.jsonl and the logs go to")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU and in Triton's interpreter")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.seconds
    ends = []
    for name in args.stages:
        left = until - time.monotonic()
        if left < LEAST:
            append(args.out / "day.jsonl", {"stage": name, "status": "not begun: no time was left", "seconds": 0.0})
            ends.append("not begun")
            continue
        # A rehearsal interprets kernels, on a machine that may do other things.
        deadline = left if args.rehearse else min(STAGES[name], left)
        ends.append(run_stage(name, args.out, deadline, rehearse=args.rehearse))
    from tests.gpu import report

    print(report.overview(read(args.out / "day.jsonl")))
    return int(any(how != "done" for how in ends))


if __name__ == "__main__":
    sys.exit(main())
