"""Rank and world size of this process, from the environment of torchrun or Slurm. Does not import torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class World:
    """This process's rank in the run and the address of the rendezvous."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    simulated: bool = False
    """Whether the ranks are simulated on one machine (NPROC) and may share a GPU."""
    secret: str = field(default="", compare=False, repr=False)
    """Secret prefix of the keys in the ranks' store; empty if the launcher provides none."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "World":
        """From torchrun's variables, else from those of a Slurm step, else a world of one rank.

        Raises:
            ValueError: only some of torchrun's variables are set, or the address of a Slurm step's rank 0 is unknown.
        """
        if "RANK" in env or "WORLD_SIZE" in env:
            missing = [k for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
            if missing:
                raise ValueError(f"RANK/WORLD_SIZE are set but not {', '.join(missing)}; torchrun sets all of them")
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            local_size = int(env.get("LOCAL_WORLD_SIZE", size))
            local_rank = int(env.get("LOCAL_RANK", rank % local_size))
            return cls(rank, size, local_rank, local_size, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
        # Inside `srun`. A shell in `salloc` has a job but no step, and is a world of one rank.
        if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
            size = int(env["SLURM_NTASKS"])
            # "4(x2),3": the number of tasks on each node; this node has index SLURM_NODEID.
            per_node = [
                int(n)
                for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
                for _ in range(int(times or 1))
            ]
            address = env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"])
            port = int(env.get("MASTER_PORT") or _port(env))
            local_size = per_node[int(env.get("SLURM_NODEID", 0))]
            secret = env.get("SWITCHYARD_STORE_SECRET", "")
            return cls(
                int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local_size, address, port, secret=secret
            )
        return cls()


def _port(env: Mapping[str, str]) -> int:
    """A port that every rank derives from the job: below Linux's ephemeral ports, and different for other jobs and for
    each restart of a job, since rank 0 of the previous attempt may still be running."""
    return 10_000 + (int(env["SLURM_JOB_ID"]) + 7919 * int(env.get("SLURM_RESTART_COUNT") or 0)) % 20_000


def _first_host(nodelist: str) -> str:
    """'gpu[03-06],login1' -> 'gpu03', without Slurm's tools, which containers do not have."""
    found = re.match(r"(?:[\w.-]|\[\d+(?=[\],-])[\d,-]*\])+(?=,|$)", nodelist)
    if not found:
        raise ValueError(
            f"cannot parse the first node of SLURM_STEP_NODELIST={nodelist}; set MASTER_ADDR to the name of the node "
            "of rank 0, as launch/train.sh does in a batch job"
        )
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", found[0])


def simulated_ranks(env: Mapping[str, str] = os.environ) -> int:
    """The number of ranks to simulate on this machine, from NPROC.

    Raises:
        ValueError: not an integer of at least 1.
    """
    given = env.get("NPROC", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"NPROC={given} is not a number of ranks to start on this machine, 1 or more")
    return int(given)


def should_print(world: World, message: str) -> bool:
    """Whether this rank prints a message that all ranks have: rank 0 does, or one rank per node if the message says
    that rank 0 has failed."""
    without_0 = any(
        words in message
        for words in ("rank 0 has died", "rank 0 did not open", "rank 0 does not respond", "does not answer")
    )
    return world.rank == 0 or (without_0 and (world.rank == 1 or world.local_rank == 0))


def started_ranks(env: Mapping[str, str] = os.environ) -> tuple[World, int]:
    """(the world that a launcher has started, number of ranks to simulate); one of the two sizes is 1.

    Raises:
        ValueError: NPROC is set inside a launcher's world.
    """
    world, simulated = World.from_environment(env), simulated_ranks(env)
    if simulated > 1 and world.size > 1:
        raise ValueError(
            f"NPROC={simulated} simulates ranks in one task, but there are {world.size} tasks; unset NPROC"
        )
    return world, simulated
