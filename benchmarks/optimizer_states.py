"""`python -m benchmarks.optimizer_states`: the effect of gradients and moments in bf16 on the loss. Trains the same
model on the same batches with `optim.grad_dtype` and `optim.state_dtype` in fp32 and in bf16, and compares the mean
loss of the last steps over several seeds. `fp32 again` has a learning rate larger by a millionth, to show the effect of
rounding alone.

On processors without bf16 arithmetic the runs are in fp32; gradients, including the router's, are then still
accumulated in bf16 buckets.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.fp8_training import STABLE, mean_of_last

LIMIT = 0.0025
"""Maximum relative difference of the mean losses."""
GRADIENTS, MOMENTS = "optim.grad_dtype=bf16", "optim.state_dtype=bf16"
VARIANTS = {
    "fp32": [],
    "gradients bf16": [GRADIENTS],
    "moments bf16": [MOMENTS],
    "both bf16": [GRADIENTS, MOMENTS],
    "fp32 again": ["optim.lr=5.000005e-4"],
}


def with_bf16_buckets() -> None:
    """Runs launch.train with the arguments of the process, with gradients of fp32 parameters accumulated in bf16."""
    import torch

    from parallel import megatron_compat

    megatron_compat.load()
    from megatron.core.distributed import distributed_data_parallel as ddp

    buffer = ddp._ParamAndGradBuffer
    ddp._ParamAndGradBuffer = lambda config, dtype, _, *rest, **named: buffer(
        config, dtype, torch.bfloat16, *rest, **named
    )
    runpy.run_module("launch.train", run_name="__main__")


def command(changes: list[str], precision: str) -> list[str]:
    """The beginning of a run's command."""
    if GRADIENTS not in changes or precision != "fp32":
        return [sys.executable, "-m", "launch.train", *changes]
    own = "from benchmarks.optimizer_states import with_bf16_buckets as run; run()"
    return [sys.executable, "-c", own, *(change for change in changes if change != GRADIENTS)]


def losses(variant: str, precision: str, settings: list[str]) -> list[float]:
    """The loss of every step."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"precision={precision}", f"run.dir={folder}/run", "eval.every=0", "eval.final_batches=1"]
        fixed += ["eval.sample_tokens=0", "checkpoint.every=0", *STABLE, *settings]
        changes = [change for change in fixed if not any(change.split("=")[0] in own for own in VARIANTS[variant])]
        whole = [*command(VARIANTS[variant], precision), *changes]
        done = subprocess.run(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(whole)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        rows = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]


def summary(means: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    """By variant: the mean loss of the last steps for each seed, its relative difference from fp32, and the mean of the
    differences, its standard error (null for a single seed) and whether the mean is within the limit."""
    shown: dict[str, dict[str, object]] = {}
    for variant, found in means.items():
        each = [mine / base - 1 for mine, base in zip(found, means["fp32"], strict=True)]
        mean = statistics.fmean(each)
        error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
        shown[variant] = {"losses": found, "differences": each, "difference": mean, "standard_error": error}
        shown[variant]["within_bar"] = abs(mean) <= LIMIT
    return shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last", type=int, default=50, help="steps over which the losses are averaged")
    parser.add_argument("--seeds", type=int, default=3, help="train.seed = 1, 2, ...: initial weights and batches")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="variants besides fp32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the arithmetic")
    parser.add_argument("--at-once", type=int, default=1, help="number of concurrent runs")
    parser.add_argument("overrides", nargs="*", help="settings of all runs")
    args = parser.parse_args(argv)
    variants = list(dict.fromkeys(["fp32", *args.only]))

    def one(seed: int, variant: str) -> float:
        settings = [f"train.steps={args.steps}", f"train.seed={seed}", *args.overrides]
        mean = mean_of_last(losses(variant, args.precision, settings), args.last)
        print(f"seed {seed}, {variant}: mean of the last {args.last} steps {mean:.5f}", file=sys.stderr, flush=True)
        return mean

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.at_once)))
    with ThreadPoolExecutor(args.at_once) as pool:
        runs = {v: [pool.submit(one, seed, v) for seed in range(1, args.seeds + 1)] for v in variants}
        means = {variant: [run.result() for run in of_seeds] for variant, of_seeds in runs.items()}
    print(json.dumps(summary(means), indent=1))


if __name__ == "__main__":
    main()
