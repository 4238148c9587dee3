"""Ablation of the default run: what each of its settings contributes, and the dense model of the same arithmetic.

    python -m benchmarks.default_run [--seeds N] [--only NAME ...] [--at-once N] [--json] [SETTING=VALUE ...]

Every variant is a complete `python -m launch.train`, once per seed. The dense model trains for as many steps, and once
more for as many seconds: how much longer a step of the sparse model takes is measured in short runs of both, one right
after the other with all threads. The balance is that of the steps after the 20th:
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
from unittest import mock

SETTLED = 20
"""Steps that do not count for the balance."""
PAIRS, TIMED_STEPS = 5, 60
"""Of both models, to compare the seconds of a step: runs, and steps of each."""
DENSE, AS_LONG = "dense", "dense, as many seconds"
VARIANTS = {
    "as shipped": [],
    DENSE: ["model=tiny_dense"],
    "embedding not multiplied": ["model.embedding_multiplier=1"],
    "initial weights reduced": ["model.init_scale=0.1", "model.moe.router_init_scale=0.4"],
    "router's weights not enlarged": ["model.moe.router_init_scale=null"],
    "balancing loss of 0.01": ["model.moe.aux_loss_coeff=0.01"],
    "without QK norm": ["model.qk_norm=null"],
    "half as many sequences of 256": [
        *("train.sequence_length=256", "train.micro_batch_size=4", "train.global_batch_size=16"),
    ],
}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures by which runs are compared, from the rows of a metrics.jsonl."""
    steps = [row for row in rows if "loss" in row]
    late = [row for row in steps if row["step"] > SETTLED and row["dropped_fraction"] is not None]
    loads = [row["load_max_over_mean"] for row in late]
    return {
        "bits/byte": [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row][-1],
        "steps": len(steps),
        "s/step": statistics.median(row["step_seconds"] for row in steps),
        "max. dropped": max((row["dropped_fraction"] for row in late), default=0.0),
        "max. load": max(loads, default=0.0),
        "steps above 2": sum(load > 2 for load in loads),
        "max. dead": max(row["dead_experts"] or 0 for row in steps),
    }


def steps_of_equal_seconds(steps: int, pairs: list[tuple[float, float]]) -> int:
    """The steps of the dense model that take as long as `steps` of the sparse one, by the median of the ratios of
    (seconds of a sparse step, seconds of a dense step)."""
    return round(steps * statistics.median(sparse / dense for sparse, dense in pairs))


def time_steps(overrides: list[str]) -> list[tuple[float, float]]:
    """Seconds of a step of both models, in runs of TIMED_STEPS steps that alternate on an else idle machine."""
    runs = ([*overrides, *VARIANTS[name], f"train.steps={TIMED_STEPS}"] for name in ("as shipped", DENSE) * PAIRS)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(os.cpu_count() or 1)):
        seconds = [run(changes, 1)["s/step"] for changes in runs]
    return list(zip(seconds[::2], seconds[1::2], strict=True))


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
        seeds = range(1, args.seeds + 1)
        jobs = {name: [pool.submit(one, name, seed) for seed in seeds] for name in args.only}
        table = {name: [job.result() for job in each] for name, each in jobs.items()}
        if {"as shipped", DENSE} <= table.keys():
            pairs = time_steps(args.overrides)
            steps = steps_of_equal_seconds(round(table["as shipped"][0]["steps"]), pairs)
            print("seconds of a step, sparse | dense:", *(f"{a:.3f} | {b:.3f};" for a, b in pairs), file=sys.stderr)
            VARIANTS[AS_LONG] = [*VARIANTS[DENSE], f"train.steps={steps}"]
            table[AS_LONG] = list(pool.map(lambda seed: one(AS_LONG, seed), seeds))
    if args.json:
        print(json.dumps(table))
    else:
        show(table)


if __name__ == "__main__":
    main()
