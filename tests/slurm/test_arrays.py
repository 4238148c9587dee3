"""Jobs that are several: elements of an array, components of a heterogeneous job."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.slurm.cluster import Cluster, halt_rank_0, kill, overrides, wait_for_signal
from tests.training.helpers import ROOT, rows
from training.requeue import read_attempts


def test_elements_of_an_array_are_stopped_and_requeued_one_by_one(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """Two are stopped, the last among them, whose number is the array's; one is done already. The user's own filters of
    squeue change nothing."""
    runs = [tmp_path / f"run{element}" for element in range(3)]
    common = [word for word in overrides(corpus, tmp_path) if not word.startswith(("run.dir=", "train.steps="))]
    own = [f"run.dir={runs[0]} train.steps=2", *(f"run.dir={run} train.steps=20" for run in runs[1:])]
    filters = {"SQUEUE_STATES": "PENDING", "SQUEUE_FORMAT": "%i"}
    array = cluster.submit("--array=0-2", *common, "--", *own, script="slurm/array.sh", **filters)
    elements = [f"{array}_{element}" for element in range(3)]
    cluster.wait(elements[0], "COMPLETED", "RUNNING")
    numbers = [cluster.show(element)["JobId"] for element in elements]
    assert numbers[2] == array
    with ThreadPoolExecutor() as pool:  # each as soon as it has come so far
        halted = list(pool.map(halt_rank_0, numbers[1:], runs[1:], [3, 3]))
    cluster.wait(elements[0], "COMPLETED")
    for element, rank in zip(elements[1:], halted, strict=True):
        cluster.call("scancel", "--batch", "--signal=USR1", element)
        wait_for_signal(rank, signal.SIGUSR1)
        kill(rank, signal.SIGCONT)
    shown = [cluster.wait(element, "COMPLETED") for element in elements]
    assert [element["Restarts"] for element in shown] == ["0", "1", "1"]
    assert [len(rows(run)) for run in runs] == [2, 20, 20]
    ends = [[(attempt.attempt, attempt.end) for attempt in read_attempts(run)] for run in runs]
    assert ends == [
        [(f"{numbers[0]}.0", "done")],
        [(f"{numbers[1]}.0", "stopped"), (f"{numbers[1]}.1", "done")],
        [(f"{numbers[2]}.0", "stopped"), (f"{numbers[2]}.1", "done")],
    ]


def test_a_heterogeneous_job_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    command = ["sbatch", "--parsable", f"--output={tmp_path}/log", "--ntasks=1", ":", "--ntasks=1", "launch/train.sh"]
    job = cluster.call(*command).stdout.strip()
    cluster.settle()
    log = (tmp_path / "log").read_text()
    assert "heterogeneous job of 2 components" in log and cluster.show(job)["ExitCode"] == "2:0", log
    assert not (ROOT / "runs").exists() or not list((ROOT / "runs").glob(f"*-{job}"))
