"""Threads of a rank: how many, and how they wait."""

import os
import subprocess
import sys

import pytest

from parallel.threads import SPINS, limit_spinning, thread_wait_policy, threads_per_rank
from tests.training.helpers import ROOT


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 14),
        ({"SLURM_CPUS_ON_NODE": "8"}, 2),
        ({"SLURM_CPUS_ON_NODE": "2"}, 1),
        ({"SLURM_CPUS_PER_TASK": "14", "OMP_NUM_THREADS": "3"}, 3),
        ({"SLURM_CPUS_PER_TASK": "14", "OMP_NUM_THREADS": "4,2"}, 14),  # of nested loops: not a number of threads
    ],
)
def test_threads_are_what_the_user_said_or_slurm_gave(env: dict[str, str], threads: int) -> None:
    assert threads_per_rank(4, env) == threads


def test_only_processors_that_may_be_used_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6, 7}, raising=False)
    assert threads_per_rank(2, {}) == 2


def test_an_environment_that_says_how_to_wait_is_left_alone() -> None:
    mine = {"OMP_WAIT_POLICY": "active"}
    limit_spinning(mine)
    assert mine == {"OMP_WAIT_POLICY": "active"}
    assert thread_wait_policy(mine) == ("spin as configured", "OMP_WAIT_POLICY=active is set in the environment")
    assert thread_wait_policy({})[0] == "OpenMP default"


LOOPS = """
import sys, time
from parallel.threads import limit_spinning
if sys.argv[1] == "briefly":
    limit_spinning()
import torch
torch.set_num_threads(2)
x = torch.zeros(2**16)
x.add_(1)
begin = time.process_time()
for _ in range(100):
    x.add_(1)
    time.sleep(0.005)
print(time.process_time() - begin)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch has on Linux")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="with one processor libgomp does not spin")
def test_threads_that_wait_leave_the_processor() -> None:
    """CPU seconds of a hundred short loops with 5 ms of nothing after each: 0.02 were seen, and 0.5 as installed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    seconds = {}
    for how in ("briefly", "as installed"):
        command = [sys.executable, "-c", LOOPS, how]
        done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True, timeout=60)
        seconds[how] = float(done.stdout)
    assert seconds["briefly"] < 0.3 * seconds["as installed"], seconds
    assert thread_wait_policy({"GOMP_SPINCOUNT": SPINS})[0] == "short spin"
