"""Preparation on a Ray that this machine starts: the same folder, also after a worker was killed, and after the command
was."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed: bash launch/setup.sh data")
pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[default]"')

from corpus.pipeline.ray_executor import run_preparation_task
from tests.corpus.pipeline.helpers import content, prose

ROOT = Path(__file__).parents[3]


def test_ray_makes_the_same_tokens_though_a_worker_and_the_command_are_killed(tmp_path: Path) -> None:
    for number in range(4):
        rows = [json.dumps({"text": prose(100 * number + n)}) for n in range(3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-m", "launch.prepare", f"input=[{tmp_path}/*.jsonl]", "workers=2", "task_mib=1e-6"]
    command += ["vocab_size=300", "prepare.steps=[normalize,exact]"]
    subprocess.run([*command, f"output={tmp_path}/local", "executor=local"], cwd=ROOT, check=True)
    made = [*command, f"output={tmp_path}/ray", "executor=ray"]
    process = _started(made, tmp_path)
    os.kill(_a_worker(process, tmp_path), signal.SIGKILL)
    assert process.wait() == 0, (tmp_path / "log").read_text()  # the task is run again
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    shutil.rmtree(tmp_path / "ray")

    process = _started(made, tmp_path)
    while not (done := _completed(tmp_path)):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = _completed(tmp_path)
    process = _started(made, tmp_path)
    _a_worker(process, tmp_path)
    assert done.items() <= _completed(tmp_path).items()  # not run again
    assert process.wait() == 0, (tmp_path / "log").read_text()
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def _started(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def _completed(folder: Path) -> dict[str, int]:
    """The marks of finished tasks, and when they were written."""
    marks = (folder / "ray.work").glob("stages/*/completions/*")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in marks}


def _a_worker(command: "subprocess.Popen[bytes]", folder: Path) -> int:
    """Waits for a worker of Ray that runs a task of a command."""
    while command.poll() is None:
        for process in psutil.Process(command.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if run_preparation_task.__name__ in " ".join(process.cmdline()):
                    return process.pid
        time.sleep(0.01)
    raise AssertionError((folder / "log").read_text())
