"""Records the environment of a run: a line of environment.jsonl in the run directory for each of its attempts. Of the
environment variables only those listed here are kept: others may hold keys and passwords."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "apex", "hydra-core", "numpy", "tokenizers")
_SLURM = (
    "CLUSTER_NAME JOB_ID JOB_NAME JOB_PARTITION JOB_NODELIST JOB_NUM_NODES NTASKS TASKS_PER_NODE CPUS_PER_TASK "
    "GPUS_ON_NODE ARRAY_JOB_ID ARRAY_TASK_ID RESTART_COUNT SUBMIT_DIR"
)
_KEPT = {f"SLURM_{name}" for name in _SLURM.split()} | {
    *("LOADEDMODULES", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
}
_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "TORCH_NCCL_", "CUDA_DEVICE_")


def describe(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Time, commit, versions, machine, and relevant environment variables."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "driver": _nvidia_driver(),
        "host": platform.node(),
        "system": platform.platform(),
        "variables": {k: env[k] for k in sorted(env) if k in _KEPT or k.startswith(_PREFIXES)},
    }


def record(run_dir: Path) -> None:
    """Appends the line of this attempt. Called by rank 0."""
    with (run_dir / "environment.jsonl").open("a") as file:
        file.write(json.dumps(describe()) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """The output of a git command in the repository; None if there is none."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def _nvidia_driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None
