"""`bash slurm/local_cluster.sh run .venv/bin/python -m benchmarks.restart [overrides]`: seconds from the death of all
ranks of a job to the first step of its next attempt, by part, on a Slurm of four nodes. The run is the default one on
Python's own files, on a rank per node, with checkpoint.every=5."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 600.0
"""Seconds until the benchmark gives up."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir, log = Path(folder) / "run", Path(folder) / "job.out"
        job = _submit(run_dir, log, sys.argv[1:])
        _wait(lambda: len(_rows(run_dir)) >= 7)
        first_again = _rows(run_dir)[5]
        _call("scancel", "--signal=KILL", f"{job}.0")
        began, moments = time.monotonic(), []
        for what, happened in (
            ("the batch script has noticed", lambda: "died after step" in _text(log)),
            ("Slurm has started the job again", lambda: f"job {job}, restart 1" in _text(log)),
            ("settings, data and layout are checked", lambda: _text(run_dir / "attempts.jsonl").count('"ranks"') > 1),
            ("the checkpoint is loaded", lambda: "continuing from" in _text(log)),
            ("the first step is taken", lambda: _rows(run_dir)[5:6] not in ([], [first_again])),
        ):
            _wait(happened)
            moments.append((what, time.monotonic() - began))
        _call("scancel", job)
    before = 0.0
    for what, seconds in moments:
        print(f"{seconds - before:6.1f} s  until {what}")
        before = seconds
    print(f"{before:6.1f} s  together")


def _submit(run_dir: Path, log: Path, overrides: list[str]) -> str:
    settings = [f"run.dir={run_dir}", "checkpoint.every=5", "train.steps=5000", "eval.every=0", *overrides]
    options = ["--parsable", "--nodes=4", "--ntasks-per-node=1", f"--output={log}"]
    return _call("sbatch", *options, "launch/train.sh", *settings).strip()


def _call(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=LIMIT).stdout


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _rows(run_dir: Path) -> list[str]:
    """The rows of metrics.jsonl that are whole."""
    return [row for row in _text(run_dir / "metrics.jsonl").splitlines() if row.endswith("}")]


def _wait(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        if time.monotonic() > deadline:
            raise SystemExit("the job does not get on: see squeue and its output")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
