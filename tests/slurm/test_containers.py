"""The templates for containers, with stand-ins for pyxis and Apptainer: inside is a PATH without Slurm's commands."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, overrides
from tests.training.helpers import ROOT, rows

SLURM = ("salloc", "sattach", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
CONTAINER = """#!/bin/bash
# container IMAGE FOLDER COMMAND...
printf '%s|%s|%s\\n' "${{SLURM_STEP_ID-}}" "$1" "${{*:3}}" >>{here}/calls
cd -- "$2" && shift 2
export PATH={here}/image
if type scontrol || type srun || type squeue; then exit 70; fi 2>/dev/null
exec "$@"
"""
APPTAINER = """#!/bin/bash
[ "$1 $2 $3 $5" = "exec --nv --bind --pwd" ] && [ -d "$4" ] || exit 64
exec {here}/container "$7" "$6" "${{@:8}}"
"""
PYXIS = """#!/bin/bash
options=() image='' workdir=''
while [[ $1 == -* ]]; do
    case $1 in
    --container-image=*) image=${{1#*=}} ;;
    --container-workdir=*) workdir=${{1#*=}} ;;
    --container-mounts={root}:{root} | --no-container-mount-home) ;;
    *) options+=("$1") ;;
    esac
    shift
done
if [ -n "$image" ]; then set -- {here}/container "$image" "$workdir" "$@"; fi
exec {srun} "${{options[@]}}" "$@"
"""
PYTHON = """#!/bin/sh
echo "words of the container's own"
exec {root}/.venv/bin/python "$@"
"""


@pytest.fixture
def container(cluster: Cluster, tmp_path: Path) -> Path:
    """A folder whose `commands` come first in PATH, and whose `calls` tells what ran in the container."""
    places = {"here": tmp_path, "root": ROOT, "srun": cluster.call("which", "srun").stdout.strip()}
    (tmp_path / "commands").mkdir()
    (tmp_path / "image").mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name not in (*SLURM, "python3"):
            (tmp_path / "image" / program.name).symlink_to(program)
    for name, text in (
        ("container", CONTAINER),
        ("commands/apptainer", APPTAINER),
        ("commands/srun", PYXIS),
        ("image/python3", PYTHON),
    ):
        (tmp_path / name).write_text(text.format(**places))
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("template, steps", [("apptainer.sh", ["", "0", "0", ""]), ("pyxis.sh", ["0", "1", "1", "2"])])
def test_everything_runs_in_the_container(
    cluster: Cluster, corpus: Path, container: Path, template: str, steps: list[str]
) -> None:
    run_dir = container / "run"
    words = overrides(corpus, run_dir, "train.steps=2")
    options = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
    env = {"PATH": f"{container}/commands:{os.environ['PATH']}", "IMAGE": "docker://an image:1", "SLURM_LABELIO": "1"}
    job = cluster.submit(*options, *words, script=f"slurm/{template}", **env)
    cluster.wait(job, "COMPLETED")
    assert [row["world_size"] for row in rows(run_dir)] == [2, 2]
    kept = json.loads((run_dir / "environment.jsonl").read_text())["variables"]
    assert (kept["SLURM_JOB_ID"], kept["CUDA_VISIBLE_DEVICES"]) == (job, "0,1")  # each task sees all of its node's
    assert kept["PATH"] == f"{container}/image" and re.fullmatch(r"node\d", kept["MASTER_ADDR"])
    calls = [
        re.fullmatch(r"(\d*)\|docker://an image:1\|python3 -m (\S+) .*", call)
        for call in (container / "calls").read_text().splitlines()
    ]
    assert [call and call.groups() for call in calls] == list(
        zip(steps, ["launch.check", "launch.train", "launch.train", "launch.verdict"], strict=True)
    )
