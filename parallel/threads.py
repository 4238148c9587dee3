"""Sets the number of CPU threads of a rank and how long idle OpenMP threads spin. Does not import torch: the variables
must be set before that.

In libgomp, the OpenMP runtime of PyTorch's Linux packages, a thread that waits at the end of a parallel region spins
for milliseconds before it sleeps, and keeps its core from other processes: two runs on two cores took four times as
long as one (docs/log.md).
"""

import os
from collections.abc import Mapping, MutableMapping

SPINS = "2000"
"""Iterations of the spin loop, some microseconds, before a thread sleeps."""
OVERRIDES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning(env: MutableMapping[str, str] = os.environ) -> None:
    """Sets GOMP_SPINCOUNT, which is read once, when torch is imported, unless the environment configures it."""
    if not any(name in env for name in OVERRIDES):
        env["GOMP_SPINCOUNT"] = SPINS


def thread_wait_policy(env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """(how idle threads wait, reason) for the start table."""
    if env.get("GOMP_SPINCOUNT") == SPINS:
        return "short spin", "idle threads sleep after microseconds and free their core"
    mine = [f"{name}={env[name]}" for name in OVERRIDES if name in env]
    return ("spin as configured", f"{mine[0]} is set in the environment") if mine else ("OpenMP default", "")


def threads_per_rank(local_size: int, env: Mapping[str, str] = os.environ) -> int:
    """OMP_NUM_THREADS, else SLURM_CPUS_PER_TASK, else an equal share of the CPUs available to this process."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if env.get(name, "").isdecimal() and int(env[name]):
            return int(env[name])
    cpus = int(env.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    return max(1, cpus // local_size)
