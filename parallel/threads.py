"""How many CPU threads a rank has, and how they wait for each other. Imports nothing heavy: torch has to come later.

libgomp, the OpenMP of PyTorch's Linux packages, lets a thread that is early at the end of a loop spin for milliseconds
before it sleeps. Where anything else wants the core, that waits for a thread which does nothing: two runs on two cores
took four times as long as one (docs/log.md)."""

import os
from collections.abc import Mapping, MutableMapping

SPINS = "2000"
"""Turns of the waiting loop, some microseconds, before a thread sleeps."""
OVERRIDES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning(env: MutableMapping[str, str] = os.environ) -> None:
    """Sets GOMP_SPINCOUNT, which is read once, when torch is imported; not where the environment says how to wait."""
    if not any(name in env for name in OVERRIDES):
        env["GOMP_SPINCOUNT"] = SPINS


def waiting(env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """(how threads wait, why) for the start table."""
    if env.get("GOMP_SPINCOUNT") == SPINS:
        return "wait briefly", "then they sleep and leave the core to who has work"
    mine = [f"{name}={env[name]}" for name in OVERRIDES if name in env]
    return ("wait as set", f"{mine[0]} is in the environment") if mine else ("wait as OpenMP has it", "nothing is set")


def threads_per_rank(local_size: int, env: Mapping[str, str] = os.environ) -> int:
    """OMP_NUM_THREADS, else the CPUs that Slurm gave the task, else an equal share of those that may be used here."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if env.get(name, "").isdecimal() and int(env[name]):
            return int(env[name])
    cpus = int(env.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    return max(1, cpus // local_size)
