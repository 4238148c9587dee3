"""Checks a Slurm allocation and builds sbatch command lines. Does not import torch."""

import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf.schema import ClusterConfig

SCRIPT = "launch/train.sh"


@dataclass(frozen=True)
class Allocation:
    """The Slurm allocation of the job that this process runs in."""

    tasks: int
    nodes: int
    gpus_per_node: int

    def check(self, ranks: int) -> None:
        """Raises ValueError if a node has fewer GPUs than ranks. Without any GPUs the run is on CPUs."""
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
                f"{self.gpus_per_node - per_node} GPU(s) of every node are not used: one task uses one GPU "
                f"(--ntasks-per-node={self.gpus_per_node})"
            ]
        return []


def allocation(env: Mapping[str, str] = os.environ) -> Allocation | None:
    """The allocation of this process; None outside of a Slurm job."""
    if "SLURM_JOB_ID" not in env:
        return None
    nodes = int(env.get("SLURM_JOB_NUM_NODES") or 1)
    return Allocation(int(env.get("SLURM_NTASKS") or nodes), nodes, int(env.get("SLURM_GPUS_ON_NODE") or 0))


@dataclass(frozen=True)
class Shape:
    """The nodes and tasks for a number of ranks on a cluster."""

    nodes: int
    tasks_per_node: int
    cluster: ClusterConfig

    @classmethod
    def of(cls, cluster: ClusterConfig, ranks: int) -> "Shape":
        """Raises ValueError: the cluster is unknown, or the ranks cannot be distributed evenly over its nodes."""
        if cluster.name is None:
            raise ValueError(
                "--slurm needs to know the nodes: cluster=h100 (or a100, b200, cpu, h200), or cluster.name=mine "
                "cluster.ranks_per_node=8 cluster.gpus=true"
            )
        per_node = cluster.ranks_per_node
        nodes = math.ceil(ranks / per_node)
        if ranks % nodes:
            raise ValueError(
                f"{ranks} ranks cannot be distributed evenly over {nodes} nodes of {per_node}; "
                f"nearest: ranks={(nodes - 1) * per_node} or ranks={nodes * per_node}"
            )
        return cls(nodes, ranks // nodes, cluster)

    def options(self, *, elastic: bool = False) -> list[str]:
        """The options of sbatch.

        Args:
            elastic: for a job that may be requeued with another number of nodes (--nodes=MIN-MAX in further options):
                without a number of tasks, of which one per GPU is started.
        """
        words = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks_per_node}"]
        if elastic and self.cluster.gpus:
            words[1] = "--exclusive"
        if self.cluster.gpus:
            words.append(f"--gpus-per-node={self.tasks_per_node}")
        if self.cluster.cpus_per_rank:
            words.append(f"--cpus-per-task={self.cluster.cpus_per_rank}")
        return words


def sbatch_command(
    shape: Shape, options: Sequence[str], overrides: Sequence[str], *, elastic: bool = False
) -> list[str]:
    """The command that submits a run. `options` come last and take precedence."""
    return ["sbatch", *shape.options(elastic=elastic), *options, SCRIPT, *overrides]


def ask_slurm(words: Sequence[str]) -> tuple[bool, str]:
    """(whether Slurm would accept the job, its answer), from sbatch --test-only; nothing is submitted."""
    try:
        asked = subprocess.run(
            [words[0], "--test-only", *words[1:]], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        return True, "(sbatch is not available)"
    except subprocess.TimeoutExpired:
        return False, "sbatch --test-only gave no answer within 60 s"
    return asked.returncode == 0, (asked.stderr or asked.stdout).strip()
