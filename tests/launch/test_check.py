"""A run checked before it is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import Config, ModelConfig, MoeConfig, ParallelConfig
from launch.check import fewest_ranks
from tests.training.helpers import ROOT, command_line, write_corpus

SBATCH = """#!/bin/sh
# Plays sbatch: says what it was given, and takes no job of more than four nodes.
printf '<%s>' "$@" >&2
case "$*" in *--nodes=8*) exit 1 ;; esac
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def check(corpus: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, with the tiny run's overrides."""
    flags = [word for word in words if word.startswith("--")]
    given = [word for word in words if not word.startswith("--")]
    overrides = command_line(corpus, corpus.parent / "run", *given)[3:]
    command = [sys.executable, "-m", "launch.check", *flags, *overrides]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "NPROC"}
    return subprocess.run(command, cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, timeout=240)


def test_it_says_what_the_run_would_be_and_leaves_nothing(corpus: Path) -> None:
    done = check(corpus, "parallel.tp=2", "parallel.ep=2", "ranks=8", "cluster=h200")
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "8 ranks on 1 node of 8",
        "dp4 tp2 ep2",
        "256 tokens: 1 x 2 on each of 4",
        "of 141 GB (h200)",
        "at the 450 GB/s of a node",
    ):
        assert part in done.stdout
    assert not (corpus.parent / "run").exists()


PLAYED = """
import runpy, sys, torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: sys._getframe(1).f_globals["__name__"] == "torch.utils.cpp_extension"
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["launch.check", "launch.train"])
def test_a_cuda_toolkit_without_a_gpu_is_no_news(tmp_path: Path, module: str) -> None:
    """As on a login node. torch's CUDA build, which this plays, warns of it while Megatron-Core is imported: by the
    check when there are tokens to write, by a run when there is no log yet."""
    pytest.importorskip("triton", reason="Triton is not installed, which that build always brings")
    overrides = command_line(write_corpus(tmp_path), tmp_path / "run", "train.steps=1")[3:]
    command, env = [sys.executable, "-c", PLAYED, module, *overrides], {**os.environ, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "env", "ranks"),
    [
        (["parallel.tp=2", "parallel.pp=2"], {}, 4),
        ([], {}, 1),
        ([], {"NPROC": "4"}, 4),
        ([], {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, 2),
        (["ranks=2"], {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, 2),
    ],
)
def test_how_many_ranks(corpus: Path, words: list[str], env: dict[str, str], ranks: int) -> None:
    first = check(corpus, *words, **env).stdout.splitlines()[0].split()
    assert first[:2] == ["ranks", str(ranks)]


def test_fewest_ranks_hold_both_grids() -> None:
    experts = ModelConfig(moe=MoeConfig(num_experts=8))
    parallel = ParallelConfig(tp=2, pp=2, ep=4)
    assert fewest_ranks(Config(model=experts, parallel=parallel)) == 8
    assert fewest_ranks(Config(model=experts, parallel=ParallelConfig(cp=3, ep=2))) == 6
    assert fewest_ranks(Config(parallel=ParallelConfig(tp=2))) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ranks=0"], "world_size >= 1, but it is 0"),
        (["parallel.tp=2", "ranks=3"], "world_size % (parallel.tp * parallel.pp * parallel.cp) == 0, but 3 % 2 = 1"),
        (["data.files=[nowhere.txt]"], "nowhere.txt does not exist"),
        (["ranxs=3"], "the nearest is ranks"),
        (["slurm.max_requeues=-1"], "slurm.max_requeues >= 0"),
        (["--slurm"], "cluster=h100"),
        (["--slurm", "cluster=h100", "ranks=9", "train.global_batch_size=18"], "nearest: ranks=8 or ranks=16"),
    ],
)
def test_what_cannot_work_is_one_message_and_exit_2(corpus: Path, words: list[str], expected: str) -> None:
    done = check(corpus, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("switchyard: error: ") and expected in done.stderr and "Traceback" not in done.stderr


def test_it_asks_slurm_about_the_very_command_that_it_prints(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = ["--slurm=--partition=gpu --time=1-0", "cluster=h100", "ranks=16", "train.global_batch_size=32"]
    done = check(corpus, *words, "run.name='a b'", PATH=path)
    assert done.returncode == 0
    command, answer = done.stdout.splitlines()[-2:]
    options = "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14 --partition=gpu --time=1-0"
    assert command.startswith(f"sbatch {options} launch/train.sh ") and """'run.name='"'"'a b'"'"''""" in command
    assert "ranks=16" not in command and "cluster=h100" in command
    assert answer.startswith("<--test-only><--nodes=2>") and "<run.name='a b'>" in answer
    refused = check(corpus, *words[:2], "ranks=64", "train.global_batch_size=128", PATH=path)
    assert refused.returncode == 1
