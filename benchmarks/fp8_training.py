"""`python -m benchmarks.fp8_training`: does a model survive FP8? Trains the same model on the same batches in bf16 and
in FP8, and compares the mean loss of the last steps. On a CPU FP8 is emulated: right numbers, no gain in time."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 0.0025
"""Largest relative difference of the mean losses."""


def train(precision: str, steps: int, overrides: list[str], directory: Path) -> list[float]:
    """The loss of every step."""
    settings = [f"precision={precision}", f"train.steps={steps}", f"run.dir={directory}"]
    settings += ["eval.every=0", "eval.final_batches=1", "eval.sample_tokens=0", "checkpoint.every=0"]
    if precision != "fp8":
        overrides = [o for o in overrides if not o.startswith("fp8.")]
    command = [sys.executable, "-m", "launch.train", *settings, *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def summary(losses: dict[str, list[float]], last: int) -> dict[str, object]:
    """Mean losses of the last steps, and FP8's relative difference from bf16's; spread is fp32's."""
    means = {precision: statistics.fmean(steps[-last:]) for precision, steps in losses.items()}
    difference = means["fp8"] / means["bf16"] - 1
    shown: dict[str, object] = {f"loss_{precision}": round(mean, 5) for precision, mean in means.items()}
    shown |= {"difference": round(difference, 5), "within_bar": abs(difference) <= BAR}
    return shown | ({"spread": round(means["fp32"] / means["bf16"] - 1, 5)} if "fp32" in means else {})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same training in bf16 and in FP8.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last", type=int, default=50, help="steps over which the losses are averaged")
    parser.add_argument(
        "--spread", action="store_true", help="train in fp32 as well: how far rounding alone takes a run that routes"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", help="settings of both runs; fp8.* of the second")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("bf16", "fp8", "fp32") if args.spread else ("bf16", "fp8"):
            if not args.json:
                print(f"training {args.steps} steps in {precision}", flush=True)
            losses[precision] = train(precision, args.steps, args.overrides, Path(folder) / precision)
    print(json.dumps(summary(losses, min(args.last, args.steps))))


if __name__ == "__main__":
    main()
