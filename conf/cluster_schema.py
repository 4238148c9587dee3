"""Settings of the machine that a run is planned for, and of Slurm jobs."""

from dataclasses import dataclass

from conf.setting import setting


@dataclass
class ClusterConfig:
    """The machine that a run is planned for, usually a preset: cluster=h100. `python -m launch.check` derives the
    number of nodes and tasks, the memory estimate and the links from it; a training run prints its memory estimate."""

    name: str | None = None
    """Name shown in tables. null: unspecified machine."""
    ranks_per_node: int = setting(1, ge=1)
    """GPUs per node; on nodes without GPUs, ranks per node."""
    gpus: bool = False
    """Whether each rank has a GPU."""
    memory_gb: float | None = setting(None, gt=0)
    """Memory per rank in GB (1e9 bytes): of its GPU, or its share of the node's. null: unknown."""
    cpus_per_rank: int | None = setting(None, ge=1)
    """CPUs per task to request from Slurm. null: no request."""
    link_gb_per_s: float | None = setting(None, gt=0)
    """Bandwidth between two ranks of a node, per direction, in GB/s (1e9 bytes). null: unknown."""
    network_gb_per_s: float | None = setting(None, gt=0)
    """Bandwidth between ranks of different nodes, per rank and direction, in GB/s (1e9 bytes). null: unknown."""
    storage_gb_per_s: float | None = setting(None, gt=0)
    """Bandwidth between a node and the shared storage while all nodes use it, in GB/s (1e9 bytes). null: unknown."""


@dataclass
class SlurmConfig:
    """Slurm jobs (slurm/README.md)."""

    max_requeues: int = setting(20, ge=0)
    """Maximum number of times a job is requeued, for any reason: time limit, preemption, failure. A job submitted with
    the same run.dir continues the run."""
