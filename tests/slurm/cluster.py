"""What tests do with a local Slurm: submit, wait, look, and break things."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.training.helpers import ROOT, command_line

LOCAL_CLUSTER = ROOT / "slurm" / "local_cluster.sh"
LIMIT = 240.0
"""Seconds that anything may take before the test gives up."""


class Cluster:
    def __init__(self, folder: Path, jobs: Path) -> None:
        self.folder, self.jobs = folder, jobs
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "CLUSTER_DIR": str(folder)}
        self.env.pop("NPROC", None)

    def call(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done

    def submit(self, *words: str, script: str = "launch/train.sh", **env: str) -> str:
        """sbatch's options and then the script's arguments, as typed; returns the job's id."""
        first = next((n for n, word in enumerate(words) if not word.startswith("-")), len(words))
        options, arguments = words[:first], words[first:]
        exported = ",".join(["ALL", *(f"{key}={value}" for key, value in env.items())])
        output = f"--output={self.jobs}/%j.out"
        command = ["sbatch", "--parsable", output, f"--export={exported}", *options, script, *arguments]
        return self.call(*command).stdout.strip()

    def log(self, job: str) -> str:
        path = self.jobs / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """Slurm's own view: JobState, Restarts, ExitCode and the rest."""
        text = self.call("scontrol", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: str, *states: str, limit: float = LIMIT) -> dict[str, str]:
        """Until the job is in one of the states (a job that ends in another fails the test)."""
        deadline = time.monotonic() + limit
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        while (shown := self.show(job))["JobState"] not in states:
            assert shown["JobState"] not in final, f"{shown['JobState']}\n{self.log(job)}"
            assert time.monotonic() < deadline, f"{shown}\n{self.log(job)}"
            time.sleep(0.3)
        return shown

    def wait_for_restart(self, job: str, limit: float = LIMIT) -> None:
        deadline = time.monotonic() + limit
        while int(self.show(job)["Restarts"]) == 0:
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)

    def settle(self) -> None:
        """Until no job is left and every node is idle again."""
        deadline = time.monotonic() + LIMIT
        while self.call("squeue", "--noheader").stdout or set(
            self.call("sinfo", "--noheader", "--partition=batch", "--format=%T").stdout.split()
        ) != {"idle"}:
            assert time.monotonic() < deadline, self.call("squeue").stdout + self.call("sinfo").stdout
            time.sleep(0.2)


def overrides(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    """The tiny run of tests/training, as overrides."""
    return command_line(corpus, run_dir, *more)[3:]


def processes(*words: str, env: str = "") -> list[int]:
    """Process ids whose command line holds all the words and whose environment holds `env`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(word in line for word in words) and env.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def ranks_of(job: str, rank: int) -> list[int]:
    """The processes of one rank of a job, once it has any. (srun bears a rank's number too: the batch script's.)"""
    deadline = time.monotonic() + LIMIT
    while True:
        of_job = set(processes("-m launch.train", env=f"\0SLURM_JOB_ID={job}\0")) - set(processes("srun "))
        found = of_job & set(processes("-m launch.train", env=f"\0SLURM_PROCID={rank}\0"))
        if found:
            return sorted(found)
        assert time.monotonic() < deadline, f"job {job} has no rank {rank}"
        time.sleep(0.1)


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, number)


def wait_for_steps(run_dir: Path, steps: int) -> None:
    """Until that many lines are in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not path.exists() or path.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, f"{path} has no {steps} lines"
        time.sleep(0.02)


def halt_rank_0(job: str, run_dir: Path, steps: int) -> list[int]:
    """Halts a job soon after that many steps, until its rank 0, which is returned, gets SIGCONT. Twenty steps take half
    a second, which is less than Slurm can take to pass a signal on."""
    rank = ranks_of(job, rank=0)
    wait_for_steps(run_dir, steps)
    kill(rank, signal.SIGSTOP)
    return rank


def wait_for_signal(pids: list[int], number: int) -> None:
    """Until each of these halted processes has been sent a signal."""
    deadline = time.monotonic() + LIMIT
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        while not int(re.search(r"ShdPnd:\s*(\w+)", status.read_text())[1], 16) >> (number - 1) & 1:
            assert time.monotonic() < deadline, f"process {pid} was not sent signal {number}"
            time.sleep(0.02)
