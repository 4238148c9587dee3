"""Jobs on a real Slurm: started, stopped, killed, lost, refused."""

import json
import signal
import time
from pathlib import Path

import pytest
import yaml

from parallel.local_launcher import RankPool
from tests.slurm.cluster import (
    LIMIT,
    Cluster,
    halt_rank_0,
    kill,
    overrides,
    processes,
    ranks_of,
    wait_for_signal,
    wait_for_steps,
)
from tests.training.helpers import rows, tiny_config, train, trajectory
from training.requeue import read_attempts

FOUR = ("--nodes=4", "--ntasks-per-node=1")
LAYOUT = ("parallel.tp=2", "parallel.ep=2")
OUTER = {
    **{"SLURM_ARRAY_JOB_ID": "99999", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "2"},
    **{"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "elsewhere"},
}
"""What a job inherits that is submitted inside another: from `srun --pty bash` in a requeued element of an array."""
NAME, NAME_TYPED = """it's "a run", $HOME *""", """'it\\'s "a run", $HOME *'"""


@pytest.fixture(scope="module")
def one_rank(corpus: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run on one rank, without Slurm."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    ranks.run(1, train, tiny_config(corpus, run_dir), timeout=LIMIT)
    return [row["loss"] for row in rows(run_dir)]


@pytest.fixture(scope="module")
def four_nodes(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run of 20 steps on four nodes, submitted inside another job, and its log."""
    run_dir = tmp_path_factory.mktemp("four") / "run"
    job = cluster.submit(*FOUR, *overrides(corpus, run_dir, *LAYOUT, f"run.name={NAME_TYPED}"), **OUTER)
    cluster.wait(job, "COMPLETED")
    return run_dir, cluster.log(job)


def test_four_nodes_compute_what_one_rank_computes(four_nodes: tuple[Path, str], one_rank: list[float]) -> None:
    run_dir, log = four_nodes
    got = rows(run_dir)
    assert [row["loss"] for row in got] == pytest.approx(one_rank, rel=1e-5)
    assert {row["world_size"] for row in got} == {4}
    assert "4 task(s), 0 GPU(s) a node" in log and "CUDA_DEVICE_MAX_CONNECTIONS=1" in log
    assert json.loads((run_dir / "stop.json").read_text())["code"] == 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["name"] == NAME


def test_a_job_submitted_inside_another_takes_none_of_its_variables_over(four_nodes: tuple[Path, str]) -> None:
    run_dir, log = four_nodes
    (attempt,) = read_attempts(run_dir)
    job, _, restart = attempt.attempt.partition(".")
    kept = json.loads((run_dir / "environment.jsonl").read_text())["variables"]
    assert restart == kept["SLURM_RESTART_COUNT"] == "0" and attempt.end == "done" and f"job {job}, restart 0" in log
    assert "SLURM_ARRAY_JOB_ID" not in kept and kept["MASTER_ADDR"] == "node1"


def test_told_that_time_is_up_it_is_requeued_and_goes_on_bit_for_bit(
    cluster: Cluster, corpus: Path, four_nodes: tuple[Path, str], tmp_path: Path
) -> None:
    """And a TERM while it is stopping changes nothing."""
    run_dir = tmp_path / "run"
    job = cluster.submit(*FOUR, *overrides(corpus, run_dir, *LAYOUT))
    rank_0 = halt_rank_0(job, run_dir, 3)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_for_signal(rank_0, signal.SIGUSR1)
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    kill(rank_0, signal.SIGCONT)
    shown = cluster.wait(job, "COMPLETED")
    assert shown["Restarts"] == "1"
    assert trajectory(run_dir) == trajectory(four_nodes[0])
    log = cluster.log(job)
    assert log.count("got USR1") == 1 and "restart 0" in log and "restart 1" in log and "continuing from" in log
    first, second = read_attempts(run_dir)
    assert [(a.attempt, a.end) for a in (first, second)] == [
        (f"{job}.0", "stopped"),
        (f"{job}.1", "done"),
    ]
    assert 3 <= first.step < 20 and first.checkpoint == first.step


def test_a_killed_rank_ends_the_job_and_the_next_life_goes_on(
    cluster: Cluster, corpus: Path, one_rank: list[float], tmp_path: Path
) -> None:
    """And though sbatch was to export nothing, the ranks have what the batch script has."""
    run_dir = tmp_path / "run"
    job = cluster.submit("--ntasks=2", "--export=NONE", *overrides(corpus, run_dir, "checkpoint.every=4"))
    rank_0 = halt_rank_0(job, run_dir, 6)
    killed = time.monotonic()
    kill(ranks_of(job, rank=1))
    kill(rank_0, signal.SIGCONT)
    while "died after step" not in cluster.log(job):
        assert time.monotonic() < killed + 30, cluster.log(job)
        time.sleep(0.1)
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert [row["loss"] for row in rows(run_dir)] == pytest.approx(one_rank, rel=1e-5)
    assert "step_00000004\n" in cluster.log(job).split("continuing from")[1]
    for line in (run_dir / "environment.jsonl").read_text().splitlines():
        kept = json.loads(line)["variables"]
        assert kept["NCCL_DEBUG"] == "WARN" and "/usr/bin" in kept["PATH"] and kept["MASTER_ADDR"].startswith("node")


def test_a_lost_node_and_a_rank_that_outlives_its_job(
    cluster: Cluster, corpus: Path, one_rank: list[float], tmp_path: Path
) -> None:
    """Slurm gives up a node whose daemon is dead and requeues the job elsewhere. The rank there lives on (it is
    halted meanwhile, so that it comes back at the worst time) and must leave alone what the next life writes."""
    run_dir = tmp_path / "run"
    job = cluster.submit(*overrides(corpus, run_dir, "checkpoint.every=4"))
    outliving = halt_rank_0(job, run_dir, 6) + processes("srun ", env=f"\0SLURM_JOB_ID={job}\0")
    kill(outliving, signal.SIGSTOP)
    node = cluster.show(job)["BatchHost"]
    kill(processes(f"slurmd -N {node}", str(cluster.folder)))
    cluster.wait_for_restart(job)
    assert cluster.show(job)["Restarts"] == "1"
    deadline = time.monotonic() + 60
    while "continuing from" not in cluster.log(job):  # the next life owns the directory
        assert time.monotonic() < deadline, cluster.log(job)
        time.sleep(0.05)
    kill(outliving, signal.SIGCONT)
    shown = cluster.wait(job, "COMPLETED")
    assert shown["NodeList"] != node and shown["Restarts"] == "1"
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 21))
    assert [row["loss"] for row in rows(run_dir)] == pytest.approx(one_rank, rel=1e-5)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_00000016", "step_00000020"]
    deadline = time.monotonic() + 60
    while "another process has taken over" not in (run_dir / "train.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.call("bash", "slurm/local_cluster.sh", "start", node)
    cluster.settle()


def test_failing_twice_at_one_step_is_enough(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Every rank dies as soon as it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'launch.train' in sys.orig_argv: os.kill(os.getpid(), 9)\n"
    )
    job = cluster.submit("--ntasks=2", *overrides(corpus, tmp_path / "run"), PYTHONPATH=str(tmp_path))
    shown = cluster.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("1", "1:0")
    assert "The previous attempt ended in the same way" in cluster.log(job)


def test_a_job_is_requeued_only_so_often(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(*overrides(corpus, run_dir, "slurm.max_requeues=0", "train.steps=2000", "train.log_every=5"))
    wait_for_steps(run_dir, 1)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = cluster.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "75:0")
    assert "slurm.max_requeues=0" in cluster.log(job)
    assert list((run_dir / "checkpoints").iterdir())


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Even when it was stopping anyway. What it had is saved."""
    run_dir = tmp_path / "run"
    job = cluster.submit(*overrides(corpus, run_dir, "train.steps=2000", "train.log_every=5"))
    wait_for_steps(run_dir, 1)
    cluster.call("scancel", job)
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    deadline = time.monotonic() + 30
    while "Slurm is ending this job" not in cluster.log(job):
        assert time.monotonic() < deadline, cluster.log(job)
        time.sleep(0.1)
    cluster.settle()
    assert cluster.show(job)["JobState"] == "CANCELLED"
    assert list((run_dir / "checkpoints").iterdir())


def test_a_preempted_job_stops_with_a_checkpoint_and_waits_for_its_turn(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(*overrides(corpus, run_dir, "train.steps=5000", "train.log_every=5"))
    wait_for_steps(run_dir, 1)
    cluster.call("srun", "--partition=urgent", "--nodes=4", "--exclusive", "true")  # returns when it has had its turn
    assert cluster.show(job)["Restarts"] == "1"
    (attempt,) = read_attempts(run_dir)
    assert (attempt.attempt, attempt.end, attempt.reason) == (f"{job}.0", "stopped", "SIGUSR1")
    assert 0 <= attempt.checkpoint - attempt.step < 5  # of a life's steps only every fifth is logged
    cluster.call("scancel", job)
    cluster.settle()


def test_neither_a_full_disk_nor_a_verdict_that_fails_loses_the_requeue(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """Nothing can be written to the job's output, and launch.verdict ends without an answer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'launch.verdict' in sys.orig_argv and os.environ['SLURM_RESTART_COUNT'] == '0': os.kill(os.getpid(), 9)\n"
    )
    run_dir = tmp_path / "run"
    words = overrides(corpus, run_dir, "train.steps=6")
    job = cluster.submit("--output=/dev/full", *words, PYTHONPATH=str(tmp_path))
    rank_0 = halt_rank_0(job, run_dir, 2)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_for_signal(rank_0, signal.SIGUSR1)
    kill(rank_0, signal.SIGCONT)
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert len(rows(run_dir)) == 6
    assert [(attempt.attempt, attempt.end) for attempt in read_attempts(run_dir)] == [(f"{job}.1", "done")]


def test_a_layout_that_does_not_fit_the_allocation_is_told_at_once(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    job = cluster.submit("--nodes=3", "--ntasks-per-node=1", *overrides(corpus, tmp_path / "run", *LAYOUT))
    shown = cluster.wait(job, "FAILED", limit=20)
    assert time.monotonic() - began < 20
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "2:0")
    log = cluster.log(job)
    assert "world_size % (parallel.tp * parallel.pp * parallel.cp) == 0, but 3 % 2 = 1" in log
    assert "Traceback" not in log and "srun: " not in log and not (tmp_path / "run").exists()
