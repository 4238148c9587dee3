"""What a run asks of Slurm, without one."""

import pytest

from conf.schema import ClusterConfig
from training.slurm import Allocation, Shape, allocation, sbatch_command

H100 = ClusterConfig("h100", 8, True, 80.0, 14, 450.0, 50.0)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (4, "--nodes=1 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=14"),
        (8, "--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14"),
        (12, "--nodes=2 --ntasks-per-node=6 --gpus-per-node=6 --cpus-per-task=14"),
        (64, "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14"),
    ],
)
def test_the_nodes_of_a_number_of_ranks(ranks: int, words: str) -> None:
    assert " ".join(Shape.of(H100, ranks).options()) == words


def test_nodes_without_gpus() -> None:
    assert Shape.of(ClusterConfig("mine", ranks_per_node=2), 8).options() == ["--nodes=4", "--ntasks-per-node=2"]


def test_a_job_whose_nodes_may_change_has_no_number_of_tasks() -> None:
    """Slurm would keep it."""
    words = "--nodes=2 --exclusive --gpus-per-node=8 --cpus-per-task=14"
    assert " ".join(Shape.of(H100, 16).options(elastic=True)) == words


def test_own_options_come_last_and_overrides_after_the_script() -> None:
    command = sbatch_command(Shape.of(H100, 8), ["--gpus-per-node=h100:8"], ["run.name=a b"])
    assert command[-3:] == ["--gpus-per-node=h100:8", "launch/train.sh", "run.name=a b"]


def test_nodes_that_would_not_be_alike() -> None:
    with pytest.raises(ValueError, match=r"evenly over 3 nodes of 8; nearest: ranks=16 or ranks=24"):
        Shape.of(H100, 17)
    with pytest.raises(ValueError, match="cluster=h100"):
        Shape.of(ClusterConfig(), 8)


def test_a_task_needs_a_gpu() -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "4"}
    given = allocation(job)
    assert given == Allocation(tasks=16, nodes=2, gpus_per_node=4)
    with pytest.raises(ValueError, match=r"8 tasks on a node share 4 GPU.*--gpus-per-node=8.*--ntasks-per-node=4"):
        given.check(16)
    given.check(8)
    assert given.notes(8) == [] and "2 GPU(s) of every node are not used" in given.notes(4)[0]
    Allocation(16, 2, 0).check(16)  # on CPUs
    assert allocation({}) is None
