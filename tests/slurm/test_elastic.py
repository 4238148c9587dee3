"""A job that goes on with fewer nodes, on a real Slurm."""

import signal
import time
from pathlib import Path

import pytest

from parallel.local_launcher import RankPool
from tests.slurm.cluster import LIMIT, Cluster, halt_rank_0, kill, overrides, ranks_of
from tests.training.helpers import rows, tiny_config, train
from training.requeue import read_attempts, read_starts


def _kill_rank_1(job: str, run_dir: Path, steps: int) -> None:
    """The rank on the second node, after that many steps."""
    rank_0 = halt_rank_0(job, run_dir, steps)
    kill(ranks_of(job, rank=1))
    kill(rank_0, signal.SIGCONT)


def _wait_for(cluster: Cluster, job: str, words: str) -> None:
    deadline = time.monotonic() + LIMIT
    while words not in cluster.log(job):
        assert time.monotonic() < deadline, cluster.log(job)
        time.sleep(0.1)


def test_a_job_does_without_a_drained_node_and_one_that_keeps_failing(
    cluster: Cluster, corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """Four nodes, then three since node4 is drained, then two since the run has died on node2 twice."""
    alone = tiny_config(corpus, tmp_path / "alone", global_batch_size=24)
    ranks.run(1, train, alone, timeout=LIMIT)
    run_dir = tmp_path / "run"
    settings = ("parallel=auto", "train.global_batch_size=24", "checkpoint.every=2")
    job = cluster.submit("--nodes=2-4", *overrides(corpus, run_dir, *settings))
    try:
        cluster.wait(job, "RUNNING")
        cluster.call("scontrol", "update", "NodeName=node4", "State=DRAIN", "Reason=test")
        _kill_rank_1(job, run_dir, 3)
        _wait_for(cluster, job, "continuing from")
        _kill_rank_1(job, run_dir, 6)
        assert cluster.wait(job, "COMPLETED")["Restarts"] == "2"
    finally:
        cluster.call("scontrol", "update", "NodeName=node4", "State=RESUME")
    got = rows(run_dir)
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in rows(tmp_path / "alone")], rel=1e-5)
    assert {row["world_size"] for row in got} == {4, 3, 2}
    assert [(start.nodes, start.layout) for start in read_starts(run_dir)] == [
        (["node1", "node2", "node3", "node4"], "dp4"),
        (["node1", "node2", "node3"], "dp3"),
        (["node1", "node3"], "dp2"),
    ]
    ends = [(attempt.end, attempt.failed_nodes) for attempt in read_attempts(run_dir)]
    assert ends == [("died", ["node2"]), ("died", ["node2"]), ("done", [])]
    log = cluster.log(job)
    assert "node2 has failed repeatedly: the job is kept off it from now on" in log
    assert "4 nodes in attempt 1, 3 in attempt 2, 2 in attempt 3" in log and "dp4, then dp3, then dp2" in log
    assert cluster.show(job)["ExcNodeList"] == "node2"
    cluster.settle()
