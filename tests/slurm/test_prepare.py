"""Data preparation on a real Slurm of four nodes."""

import sys
import time
from pathlib import Path

import pytest

from conf.override_text import override
from launch.prepare import main
from tests.corpus.pipeline.helpers import content, settings, write_corpus
from tests.slurm.cluster import LIMIT, Cluster

pytest.importorskip("datatrove", reason="datatrove is not installed: bash launch/setup.sh data")


def test_job_arrays_make_what_this_machine_makes(cluster: Cluster, tmp_path: Path) -> None:
    write_corpus(tmp_path, files=2)
    steps = "[normalize,{minhash:{num_buckets:1,hashes_per_bucket:4}},pii]"
    command = [sys.executable, "-m", "launch.prepare", override("output", f"{tmp_path}/there"), "executor=slurm"]
    command += [f"input=[{tmp_path}/*.jsonl]", "workers=4", "task_mib=1e-6", "vocab_size=300", f"prepare.steps={steps}"]
    command += ["slurm.mem_per_cpu_gb=1", "slurm.time=10:00"]
    done = cluster.call(*command)
    submitted = [line for line in done.stdout.splitlines() if line.startswith("submitted job ")]
    assert len(submitted) == 5, done.stdout  # filter, match, cluster, tokenise, finish
    again = cluster.call(*command, check=False)
    assert again.returncode == 2 and "are in the queue; wait for them, or scancel them" in again.stderr
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline, _logs(tmp_path)
        assert cluster.call("squeue", "--noheader").stdout or (tmp_path / "there").exists(), _logs(tmp_path)
        time.sleep(0.2)
    minhash = {"minhash": {"num_buckets": 1, "hashes_per_bucket": 4}}
    assert main(settings(tmp_path, "here", ["normalize", minhash, "pii"], workers=2)) == 0
    assert content(tmp_path / "there") == content(tmp_path / "here")
    cluster.settle()


def _logs(folder: Path) -> str:
    files = sorted(folder.glob("there.work/stages/*/slurm_logs/*")) + sorted(folder.glob("there.work/stages/*/logs/*"))
    return "\n".join(f"{file}:\n{file.read_text()[-2000:]}" for file in files)
