"""Ablation of the default run: what each of its settings contributes, and the dense model of the same arithmetic.

    python -m benchmarks.default_run [--seeds N] [--only NAME ...] [--at-once N] [--json] [SETTING=VALUE ...]

Every variant is a complete `python -m launch.train`, once per seed. The balance is that of the steps after the 20th:
the largest share of assignments that a step dropped, the largest load of an expert over the mean of its layer, and the
number of steps in which that was above 2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SETTLED = 20
"""Steps that do not count for the balance."""
VARIANTS = {
    "as shipped": [],
    "embedding not multiplied": ["model.embedding_multiplier=1"],
    "embedding multiplied by 16": ["model.embedding_multiplier=16"],
    "initial weights reduced": ["model.init_scale=0.1"],
    "balancing loss of 0.01": ["model.moe.aux_loss_coeff=0.01"],
    "without QK norm": ["model.qk_norm=null"],
    "half the learning rate": ["optim.lr=2e-3"],
    "half the warm-up": ["optim.warmup_steps=20"],
    "dense": ["model=tiny_dense"],
}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures by which runs are compared, from the rows of a metrics.jsonl."""
    steps = [row for row in rows if "loss" in row]
    late = [row for row in steps if row["step"] > SETTLED and row["dropped_fraction"] is not None]
    loads = [row["load_max_over_mean"] for row in late]
    return {
        "bits/byte": [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row][-1],
        "s/step": statistics.median(row["step_seconds"] for row in steps),
        "max. dropped": max((row["dropped_fraction"] for row in late), default=0.0),
        "max. load": max(loads, default=0.0),
        "steps above 2": sum(load > 2 for load in loads),
        "max. dead": max(row["dead_experts"] or 0 for row in steps),
    }


def run(changes: list[str], seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run.dir={folder}/run", f"train.seed={seed}", "checkpoint.every=0", "eval.every=0"]
        command = [sys.executable, "-m", "launch.train", *fixed, "eval.sample_tokens=0", *changes]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return figures([json.loads(r) for r in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()])


def show(table: dict[str, list[dict[str, float]]]) -> None:
    """One row per variant: of each figure the mean, or for a maximum the largest, of the seeds."""
    columns = list(next(iter(table.values()))[0])
    print(f"{'':28}" + "".join(f"{column:>15}" for column in columns) + f"{'spread':>10}")
    for name, found in table.items():
        cells = []
        for column in columns:
            values = [one[column] for one in found]
            cells.append(max(values) if column.startswith("max.") else statistics.fmean(values))
        spread = max(one["bits/byte"] for one in found) - min(one["bits/byte"] for one in found)
        print(f"{name:28}" + "".join(f"{cell:>15.3f}" for cell in cells) + f"{spread:>10.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="train.seed = 1, 2, ...: initial weights and batches")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--at-once", type=int, default=1, help="number of concurrent runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="settings of all runs")
    args = parser.parse_args(argv)

    def one(name: str, seed: int) -> dict[str, float]:
        found = run([*args.overrides, *VARIANTS[name]], seed)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(f"seed {seed}, {name}: {shown}", file=sys.stderr, flush=True)
        return found

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.at_once)))
    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = {name: [pool.submit(one, name, seed + 1) for seed in range(args.seeds)] for name in args.only}
        table = {name: [job.result() for job in each] for name, each in jobs.items()}
    if args.json:
        print(json.dumps(table))
    else:
        show(table)


if __name__ == "__main__":
    main()
