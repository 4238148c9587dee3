"""A real Slurm of four virtual nodes, once for the session."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import LOCAL_CLUSTER, Cluster
from tests.training.helpers import write_corpus

_PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Skips where there is no Slurm; where SWITCHYARD_NEEDS_SLURM is set (.ci/run), that is a failure."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in _PROGRAMS if not shutil.which(name, path=path)]
    reason = f"no {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else ""
    if not reason and os.geteuid() != 0:
        reason = "a local Slurm needs root"
    if reason and os.environ.get("SWITCHYARD_NEEDS_SLURM"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Not under pytest's own folder, which others may not enter: munge refuses that.
    folder = Path(f"/tmp/switchyard-slurm-test-{os.getpid()}")
    # It ends when its standard input does: with this process, however that ends.
    process = subprocess.Popen(
        ["bash", str(LOCAL_CLUSTER), "run", "bash", "-c", "echo ready; cat"],
        env={**os.environ, "CLUSTER_DIR": str(folder), "NODE_TIMEOUT": "9", "CPUS": "128", "GPUS": "8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n", "the local Slurm did not start; its words are above"
    yield Cluster(folder, tmp_path_factory.mktemp("jobs"))
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
