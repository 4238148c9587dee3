"""Preparation on a Ray that this machine starts: the same folder, also after a worker was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed: bash launch/setup.sh data")
pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[default]"')

from tests.corpus.pipeline.helpers import content, prose

ROOT = Path(__file__).parents[3]


def test_ray_makes_the_same_tokens_though_a_worker_is_killed(tmp_path: Path) -> None:
    for number in range(4):
        rows = [json.dumps({"text": prose(100 * number + n)}) for n in range(3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-m", "launch.prepare", f"input=[{tmp_path}/*.jsonl]", "workers=2", "task_mib=1e-6"]
    command += ["vocab_size=300", "prepare.steps=[normalize,exact]"]
    subprocess.run([*command, f"output={tmp_path}/local", "executor=local"], cwd=ROOT, check=True)
    made = [*command, f"output={tmp_path}/ray", "executor=ray"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(made, cwd=ROOT, stdout=log, stderr=log)
        while not (killed := _a_worker(process.pid)):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(killed, signal.SIGKILL)
        process.wait()
    if process.returncode:  # Ray has given the task up: the same command continues
        assert process.returncode == 1 and "run the same command again" in (tmp_path / "log").read_text()
        subprocess.run(made, cwd=ROOT, check=True)
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def _a_worker(command: int) -> int | None:
    """An actor of Ray that works for a command."""
    for process in psutil.Process(command).children(recursive=True):
        try:
            if "RankWorker" in " ".join(process.cmdline()):
                return process.pid
        except psutil.Error:
            continue
    return None
