"""The scripts of slurm/ and the commands around a job, on a real Slurm."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.slurm.cluster import LOCAL_CLUSTER, Cluster, kill, overrides, processes, wait_for_steps
from tests.training.helpers import ROOT, rows

ON_A_LOGIN_NODE = {"chain.sh", LOCAL_CLUSTER.name}
TEMPLATES = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name not in ON_A_LOGIN_NODE)


def test_a_sweep_is_a_run_per_element_and_survives_a_new_controller(cluster: Cluster, corpus: Path) -> None:
    sweep = ["optim.lr=1e-3", "optim.lr=2e-3", "optim.lr=3e-3 optim.warmup_steps=2", "model.moe.top_k=2"]
    name = f"sweep{os.getpid()}"
    common = [word for word in overrides(corpus, corpus, f"run.name={name}", "train.steps=6") if "run.dir=" not in word]
    job = cluster.submit("--array=0-3", *common, "--", *sweep, script="slurm/array.sh")
    runs = [ROOT / "runs" / f"{name}-{job}_{element}" for element in range(4)]
    try:
        wait_for_steps(runs[3], 1)
        kill(processes("slurmctld", str(cluster.folder)), signal.SIGTERM)
        cluster.call("bash", str(LOCAL_CLUSTER), "start")
        cluster.settle()
        assert [len(rows(run)) for run in runs] == [6] * 4
        answer = cluster.call(sys.executable, "-m", "launch.compare", "format=json", *map(str, runs)).stdout
        compared = json.loads(answer)
        assert {run["steps"] for run in compared} == {"6/6"}
        keys = ("model.moe.top_k", "optim.lr", "optim.warmup_steps")
        assert {*compared[0]["settings"]} == {*keys}
        assert [[run["settings"][key] for key in keys] for run in compared] == [
            [1, 0.001, 4],
            [1, 0.002, 4],
            [1, 0.003, 2],
            [2, 0.002, 4],
        ]
    finally:
        for run in runs:
            shutil.rmtree(run, ignore_errors=True)


def test_a_sweep_of_another_size_than_its_array(cluster: Cluster) -> None:
    job = cluster.submit("--array=1", "train.steps=1", "--", "optim.lr=1e-3", script="slurm/array.sh")
    cluster.wait(job, "FAILED")
    (log,) = [path.read_text() for path in cluster.jobs.iterdir() if "words after --" in path.read_text()]
    assert "1 words after --, so --array=0-0; but this is element 1" in log


@pytest.mark.parametrize(
    "word, overrides_of_it",
    [
        ("", []),
        (" optim.lr=3e-3  optim.warmup_steps=60 ", ["optim.lr=3e-3", "optim.warmup_steps=60"]),
        ("run.name='a b' data.files=[x, y] +z@a/b=1", ["run.name='a b'", "data.files=[x, y]", "+z@a/b=1"]),
    ],
)
def test_a_word_of_a_sweep_holds_overrides(tmp_path: Path, word: str, overrides_of_it: list[str]) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.sh").write_text("printf '%s\\n' \"$@\"\n")
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "1"}
    command = ["bash", ROOT / "slurm" / "array.sh", "train.steps=1", "--", "other=1", word]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train.steps=1", *overrides_of_it]


def test_inside_salloc_it_starts_the_ranks_and_is_not_requeued(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = overrides(corpus, run_dir, "train.steps=2000", "train.log_every=2")
    command = ["salloc", "--ntasks=2", "bash", "launch/train.sh", *words]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=cluster.env, stdout=log, stderr=log, process_group=0)
    wait_for_steps(run_dir, 1)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "the same command with run.dir=" in log and rows(run_dir)[-1]["world_size"] == 2
    assert len(list((run_dir / "checkpoints").iterdir())) == 1


def test_a_task_of_somebody_elses_srun_is_a_rank(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    words = overrides(corpus, tmp_path / "run", "train.steps=2")
    cluster.call("srun", "--ntasks=2", "bash", "launch/train.sh", *words)
    assert [row["world_size"] for row in rows(tmp_path / "run")] == [2, 2]


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_would_take_every_template(cluster: Cluster, template: str) -> None:
    cluster.call("sbatch", "--test-only", f"slurm/{template}", "train.steps=1")


def test_a_chain_goes_on_until_the_run_is_done(cluster: Cluster, tmp_path: Path) -> None:
    """With scripts that end as jobs of a run do."""
    run_dir = tmp_path / "it's (a) run, x=1"
    chains = {}
    for name, code in (("stopped", 75), ("done", 0)):
        script = tmp_path / f"{name}.sh"
        script.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{tmp_path}/{name}\nexit {code}\n')
        command = [
            "bash",
            "slurm/chain.sh",
            "3",
            str(run_dir),
            f"--output={tmp_path}/log",
            str(script),
            "train.steps=1",
        ]
        chains[name] = cluster.call(*command).stdout.split()
    assert cluster.show(chains["stopped"][2])["Requeue"] == "0"
    cluster.settle()
    assert [cluster.show(job)["JobState"] for job in chains["stopped"]] == ["FAILED"] * 3
    assert [cluster.show(job)["JobState"] for job in chains["done"]] == ["COMPLETED", "CANCELLED", "CANCELLED"]
    (given,) = (tmp_path / "done").read_text().splitlines()
    assert given.startswith("train.steps=1 run.dir=") and given.endswith(" slurm.max_requeues=0")
    override = given.removeprefix("train.steps=1 ").removesuffix(" slurm.max_requeues=0")
    assert OverridesParser.create().parse_override(override).value() == str(run_dir)
    assert len((tmp_path / "stopped").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["abc", "runs/x", "launch/train.sh"], "the number of jobs must be 1 to 9999, not 'abc'"),
        (["0", "runs/x", "launch/train.sh"], "must be 1 to 9999, not '0'"),
        (["2"], "no run directory is given"),
        (["2", "runs/x"], "no command to submit is given"),
        (["2", "runs/x", "--dependency=afterok:7", "launch/train.sh"], "--dependency=afterok:7: the chain sets"),
    ],
)
def test_a_chain_that_cannot_be(words: list[str], message: str) -> None:
    refused = subprocess.run(["bash", "slurm/chain.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == "" and message in refused.stderr


def test_slurm_says_before_the_queue_what_it_would_not_take(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    words = [*overrides(corpus, tmp_path / "run", "train.global_batch_size=16"), "cluster=cpu", "ranks=8"]
    taken = cluster.call(sys.executable, "-m", "launch.check", "--slurm", *words)
    assert "--nodes=4 --ntasks-per-node=2 --cpus-per-task=32 launch/train.sh" in taken.stdout
    assert "to start at" in taken.stdout
    for options in ("--nodes=5", "--partition=nowhere", "--gpus-per-node=9"):
        refused = cluster.call(sys.executable, "-m", "launch.check", f"--slurm={options}", *words, check=False)
        assert refused.returncode == 1 and "allocation failure" in refused.stdout, refused


@pytest.mark.usefixtures("slurm_programs")
def test_the_cluster_comes_and_goes() -> None:
    """up and down, as typed by hand, and nothing stays."""
    env = {**os.environ, "CLUSTER_DIR": f"/tmp/switchyard-slurm-updown-{os.getpid()}", "NODES": "2"}
    call = ["bash", str(LOCAL_CLUSTER)]
    up = subprocess.run([*call, "up"], env=env, capture_output=True, text=True, timeout=60)
    assert up.returncode == 0, up.stderr
    export = up.stdout.strip()
    again = subprocess.run([*call, "up"], env=env, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1 and "one is running" in again.stderr
    shown = subprocess.run(["bash", "-c", f"{export}; srun --nodes=2 hostname"], capture_output=True, text=True)
    assert sorted(shown.stdout.split()) == ["node1", "node2"]
    assert processes(env["CLUSTER_DIR"])
    subprocess.run([*call, "down"], env=env, check=True, timeout=60)
    assert not processes(env["CLUSTER_DIR"]) and not Path(env["CLUSTER_DIR"]).exists()
