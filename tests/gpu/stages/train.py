"""`launch.train` as users start it: 60 steps; stopped and continued, bit for bit; twice the same; how long training
stands still for a checkpoint; FP8 beside bf16."""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu.stages.common import REHEARSE, attempt

STEPS, EXACT = (6, 6) if REHEARSE else (60, 20)
"""Of most runs; of those that are compared bit for bit."""
SIZE = ["model.num_layers=4", "model.hidden_size=512", "model.num_attention_heads=8", "model.ffn_hidden_size=1024"]
if REHEARSE:
    SIZE = ["model.num_layers=2", "model.hidden_size=128", "model.num_attention_heads=2", "model.ffn_hidden_size=128"]
    SIZE += [
        "model.vocab_size=320",
        "train.sequence_length=32",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
    ]
QUIET = ["eval.every=0", "eval.final_batches=1", "eval.sample_tokens=0", "optim.lr=5e-4"]


def run(folder: Path, name: str, *overrides: str, steps: int = STEPS) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    directory = folder / name
    text = f"data.files=[{folder}/text/*.txt]"
    command = [sys.executable, "-m", "launch.train", "data=text", text, *SIZE, *QUIET, f"train.steps={steps}"]
    command += [f"run.dir={directory}", f"data.cache_dir={folder}/cache", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    print(name, done.stdout[-4000:], sep="\n", flush=True)
    if done.returncode not in (0, 75):
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stdout[-300:]}")
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def write_text(folder: Path) -> None:
    """This repository's own sources, so that nothing is downloaded."""
    (folder / "text").mkdir()
    for index, path in enumerate(sorted(Path().glob("*/**/*.py"))):
        if ".venv" not in path.parts and path.stat().st_size:
            (folder / "text" / f"{index}.txt").write_text(path.read_text())


def plain(folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    rows = run(folder, "plain")
    seconds = time.perf_counter() - begin
    later = rows[len(rows) // 2 :]
    return {
        "seconds": seconds,
        "seconds_around_the_steps": seconds - sum(row["step_seconds"] for row in rows),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "step_seconds": sorted(row["step_seconds"] for row in later)[len(later) // 2],
        "mfu": rows[-1].get("mfu"),
    }


def continued(folder: Path) -> dict[str, Any]:
    """Deterministic: once through, again, and with a stop in the middle; beside each other."""
    exact = "train.deterministic=true"

    def stopped() -> list[float]:
        run(folder, "stopped", exact, f"train.stop_after={EXACT // 2}", steps=EXACT)
        return losses("stopped")

    def losses(name: str) -> list[float]:
        return [row["loss"] for row in run(folder, name, exact, steps=EXACT)]

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(losses, "once"), pool.submit(losses, "again"), pool.submit(stopped)]
        once, again, whole = (future.result() for future in futures)
    return {"repeats": once == again, "continues": once == whole, "steps": len(once)}


def checkpoints() -> dict[str, float]:
    """Seconds that training stands still for a checkpoint, written at once and in the background."""
    from benchmarks.checkpoint import measure
    from benchmarks.measurement import quietly

    hidden, layers, repetitions = (16, 1, 1) if REHEARSE else (512, 4, 2)
    with quietly():
        mib, at_once, in_background, whole, _ = measure(hidden, layers, repetitions)
    return {"mib": mib, "at_once": at_once, "in_background": in_background, "whole_after": whole}


def fp8(folder: Path) -> dict[str, Any]:
    last = STEPS // 4

    def mean(precision: str) -> float:
        rows = run(folder, precision, f"precision={precision}")
        return sum(row["loss"] for row in rows[-last:]) / last

    with ThreadPoolExecutor(2) as pool:
        bf16, narrow = pool.map(mean, ("bf16", "fp8"))
    return {"bf16": bf16, "fp8": narrow, "difference": narrow / bf16 - 1, "steps": STEPS}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder)
        attempt("checkpoint", checkpoints)  # first: nothing runs beside it
        with ThreadPoolExecutor(2) as pool:  # these are not timed
            pool.submit(attempt, "stop and continue, twice the same", lambda: continued(folder))
            pool.submit(attempt, "FP8 beside bf16", lambda: fp8(folder))
        attempt("60 steps", lambda: plain(folder))


if __name__ == "__main__":
    main()
