"""What launch/job.sh does with signals, with stand-ins for Slurm's commands and for Python: no cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.helpers import ROOT

PYTHON = """#!/bin/bash
case $* in
*launch.check*) echo "1 1 {{}} {here}" ;;
*launch.verdict*) echo "$*" >{here}/verdict && echo 75 ;;
esac
"""
SRUN = """#!/bin/bash
# Passes the first signals on to nobody, as while it has started no task.
trap 'echo USR1 >>{here}/got; [ "$(wc -l <{here}/got)" -lt "$LOSES" ] || exit 0' USR1
trap 'echo TERM >>{here}/got; exit 1' TERM
touch {here}/started
while :; do sleep 0.05; done
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    commands = {"python": PYTHON, "srun": SRUN, "squeue": "#!/bin/sh\nexit 1\n", "scontrol": "#!/bin/sh\nexit 1\n"}
    for name, text in commands.items():
        (tmp_path / name).write_text(text.format(here=tmp_path))
        (tmp_path / name).chmod(0o755)
    return tmp_path


def _start(here: Path, loses: int, **env: str) -> subprocess.Popen[bytes]:
    """Returns once srun is running."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") and key != "ENVIRONMENT"}
    slurm = {"PATH": f"{here}:{kept['PATH']}", "SWITCHYARD_PYTHON": f"'{here}/python'", "SLURM_JOB_ID": "7", **env}
    command = ["bash", "launch/train.sh", "train.steps=1"]
    process = subprocess.Popen(command, cwd=ROOT, env={**kept, **slurm, "LOSES": str(loses)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (here / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_signal_that_srun_had_nobody_to_pass_on_to_is_repeated(here: Path) -> None:
    process = _start(here, loses=2, ENVIRONMENT="BATCH")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert (here / "got").read_text().split() == ["USR1", "USR1"]
    assert (here / "verdict").read_text().split()[2:] == ["--asked", str(here)]


def test_a_second_ctrl_c_does_not_wait(here: Path) -> None:
    process = _start(here, loses=99)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while not (here / "got").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert (here / "got").read_text().split()[-1] == "TERM" and not (here / "verdict").exists()


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_a_sweep_in_one_job_is_refused(here: Path, option: str) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    slurm = {"PATH": f"{here}:{kept['PATH']}", "SWITCHYARD_PYTHON": f"'{here}/python'", "SLURM_JOB_ID": "7"}
    command = ["bash", "launch/train.sh", option, "optim.lr=1e-3,3e-3"]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **slurm}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "slurm/array.sh" in done.stderr and not (here / "started").exists()
