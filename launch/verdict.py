"""`python -m launch.verdict [--asked] [--interactive] RUN_DIR`: what launch/job.sh does after an attempt of a run.
Prints `requeue` and the nodes to exclude from then on, or the exit code of the job, and the reason on standard error.

--asked: Slurm had announced the end of the job. --interactive: the job cannot be requeued.
SWITCHYARD_ERRORS: what srun and the ranks have said about failed tasks.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from conf.printable import visible
from conf.schema import SlurmConfig
from training.requeue import record_attempt
from training.run_dir import read_settings


def _max_requeues(run_dir: Path) -> int:
    """The run's slurm.max_requeues, or its default if the recorded settings cannot be read or are of another version:
    the job can still be requeued then."""
    try:
        section = read_settings(run_dir).get("slurm")
    except ValueError as error:
        with contextlib.suppress(OSError):  # the disk of the job's output may be full
            print(f"switchyard: warning: {visible(str(error))}", file=sys.stderr)
        section = None
    limit = section.get("max_requeues") if isinstance(section, dict) else None
    return limit if type(limit) is int else SlurmConfig().max_requeues


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--asked", action="store_true")
    parser.add_argument("--interactive", action="store_true")
    given = parser.parse_args()
    limit = None if given.interactive else _max_requeues(given.run_dir)
    errors = os.environ.get("SWITCHYARD_ERRORS", "")
    verdict = record_attempt(given.run_dir, stop_requested=given.asked, max_requeues=limit, errors=errors)
    print(" ".join(["requeue", *verdict.exclude]) if verdict.requeue else verdict.code, flush=True)
    print(f"switchyard: {visible(verdict.message)}", file=sys.stderr)  # after the answer: the job's output may be full


if __name__ == "__main__":
    main()
