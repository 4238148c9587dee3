"""What a run and Slurm have to say to each other before it starts. Imports nothing heavy."""

import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf.schema import ClusterConfig

SCRIPT = "launch/train.sh"


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given to the job that this process runs in."""

    tasks: int
    nodes: int
    gpus_per_node: int

    def check(self, ranks: int) -> None:
        """Raises ValueError when there are fewer GPUs than ranks on a node. None at all is a run on CPUs."""
        per_node = math.ceil(ranks / self.nodes)
        if 0 < self.gpus_per_node < per_node:
            raise ValueError(
                f"{per_node} tasks on a node share {self.gpus_per_node} GPU(s), but one task needs one GPU. Submit "
                f"with --gpus-per-node={per_node}, or with --ntasks-per-node={self.gpus_per_node}"
            )

    def notes(self, ranks: int) -> list[str]:
        per_node = ranks // self.nodes
        if per_node < self.gpus_per_node:
            return [
                f"{self.gpus_per_node - per_node} GPU(s) of every node have nothing to do: one task uses one GPU "
                f"(--ntasks-per-node={self.gpus_per_node})"
            ]
        return []


def allocation(env: Mapping[str, str] = os.environ) -> Allocation | None:
    """The allocation around this process, if there is one."""
    if "SLURM_JOB_ID" not in env:
        return None
    nodes = int(env.get("SLURM_JOB_NUM_NODES") or 1)
    return Allocation(int(env.get("SLURM_NTASKS") or nodes), nodes, int(env.get("SLURM_GPUS_ON_NODE") or 0))


@dataclass(frozen=True)
class Shape:
    """The nodes and tasks that a number of ranks takes on a cluster."""

    nodes: int
    tasks_per_node: int
    cluster: ClusterConfig

    @classmethod
    def of(cls, cluster: ClusterConfig, ranks: int) -> "Shape":
        """Raises ValueError: the cluster is not known, or its nodes would not be filled alike."""
        if cluster.name is None:
            raise ValueError(
                "--slurm needs to know the nodes: cluster=h100 (or a100, b200, cpu, h200), or cluster.name=mine "
                "cluster.ranks_per_node=8 cluster.gpus=true"
            )
        per_node = cluster.ranks_per_node
        nodes = math.ceil(ranks / per_node)
        if ranks % nodes:
            raise ValueError(
                f"{ranks} ranks do not fill {nodes} nodes of {per_node} alike; "
                f"nearest: ranks={(nodes - 1) * per_node} or ranks={nodes * per_node}"
            )
        return cls(nodes, ranks // nodes, cluster)

    def options(self) -> list[str]:
        """sbatch's."""
        words = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks_per_node}"]
        if self.cluster.gpus:
            words.append(f"--gpus-per-node={self.tasks_per_node}")
        if self.cluster.cpus_per_rank:
            words.append(f"--cpus-per-task={self.cluster.cpus_per_rank}")
        return words


def sbatch_command(shape: Shape, options: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The command that submits a run; `options` come last and so win."""
    return ["sbatch", *shape.options(), *options, SCRIPT, *overrides]


def ask_slurm(words: Sequence[str]) -> tuple[bool, str]:
    """Whether Slurm would take such a job now, and what it said; nothing is submitted."""
    try:
        asked = subprocess.run(
            [words[0], "--test-only", *words[1:]], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        return True, "(there is no sbatch here to ask)"
    except subprocess.TimeoutExpired:
        return False, "sbatch --test-only gave no answer within 60 s"
    return asked.returncode == 0, (asked.stderr or asked.stdout).strip()
