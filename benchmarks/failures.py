"""`python -m benchmarks.failures [--gpus N ...]`: the time that a job loses to failures, by the number of GPUs, the
time to continue after a failure, and the interval between checkpoints. Computed (training/planner/failures.py), not
measured."""

import argparse

from conf.commands import PlanOptions
from training.planner.failures import DAY, HOUR, MINUTE, Failures

INTERVALS = (5, 10, 30, 60, 180)
"""Minutes of training between checkpoints."""
RESTARTS = (2, 10, 30)
"""Minutes from a failure to the first step after it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1000, 16384])
    parser.add_argument("--mtbf-hours", type=float, default=PlanOptions().gpu_mtbf_hours, help="of one GPU")
    parser.add_argument("--checkpoint-seconds", type=float, default=10.0, help="that a checkpoint stops training for")
    given = parser.parse_args()
    for gpus in given.gpus:
        mtbf = given.mtbf_hours * HOUR / gpus
        print(f"{gpus:,} GPUs: a failure in {mtbf / HOUR:.3g} h, {DAY / mtbf:.3g} a day; minutes lost a day")
        heads = [f"every {minutes} min" for minutes in INTERVALS]
        print(f"{'to continue':>12}" + "".join(f"{head:>14}" for head in [*heads, "best", "interval"]))
        for restart in RESTARTS:
            job = Failures(mtbf, restart * MINUTE, given.checkpoint_seconds)
            lost = [job.lost(minutes * MINUTE) * DAY / MINUTE for minutes in INTERVALS]
            best = job.daly()
            cells = [*(f"{value:.0f}" for value in [*lost, job.lost(best) * DAY / MINUTE]), f"{best / MINUTE:.0f} min"]
            print(f"{restart:>8} min" + "".join(f"{cell:>14}" for cell in cells))
        print()


if __name__ == "__main__":
    main()
