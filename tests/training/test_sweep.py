"""Runs of a sweep: their names, and settings that only some of them read."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from conf import rules
from conf.override_text import override
from conf.schema import Config
from tests.training.helpers import ROOT, command_line, write_corpus
from training.run_dir import read_settings
from training.sweep import arm_name


def test_a_run_of_a_sweep_is_named_by_what_is_swept() -> None:
    typed = ["model=tiny_switch,tiny_dense", "optim.lr=1e-3,2e-3", "train.steps=5", "data.files=[a,b]"]
    arm = ["model=tiny_dense", "optim.lr=0.002", "train.steps=5", "data.files=[a,b]"]
    assert arm_name(typed, arm) == "model=tiny_dense,lr=0.002"
    assert arm_name(["train.steps=5"], ["train.steps=5"]) is None
    typed, arm = ["eval.every=1,2", "checkpoint.every=range(1,3)"], ["eval.every=1", "checkpoint.every=2"]
    assert arm_name(typed, arm) == "eval.every=1,checkpoint.every=2"
    assert arm_name([], ["train.seed=3"], ["train.seed"]) == "seed=3"


def test_names_are_safe_in_paths_and_bounded_and_never_the_same() -> None:
    values = ["'a/b'", "'a_b'", "'a b'", "..", "'é'", "x" * 300, "x" * 299 + "y", "'a,b'"]
    names = [arm_name(["eval.sample_prompt=1,2"], [f"eval.sample_prompt={value}"]) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert name and len(name) <= 100 and re.fullmatch(r"[A-Za-z0-9._+=,-]+", name)


def test_what_one_run_of_a_sweep_does_not_read_has_its_default() -> None:
    config = Config()
    config.model.moe.top_k, config.model.moe.num_shared_experts, config.model.moe.shared_expert_gate = 2, 1, True
    config.model.recompute = ["norm", "moe"]
    fitting, reset = rules.reset_unused(config, 1)
    rules.check(fitting, 1)
    assert {key: value for key, (value, _) in reset.items()} == {
        "model.recompute": ["norm"],
        "model.moe.top_k": 1,
        "model.moe.num_shared_experts": 0,
        "model.moe.shared_expert_gate": False,
    }
    config.model.moe.num_experts = 4
    assert rules.reset_unused(config, 1) == (config, {})


def test_a_sweep_over_dense_and_sparse_runs_all_in_directories_of_their_own(tmp_path: Path) -> None:
    words = ["model.moe.num_experts=0,4", "model.moe.top_k=2", "train.steps=1", "eval.sample_tokens=0", "run.name=x"]
    command = command_line(write_corpus(tmp_path), tmp_path, *words)
    command = [word for word in command if not word.startswith("run.dir=")] + ["--multirun"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    dense, sparse = (tmp_path / "runs" / f"x-num_experts={n}-17_1" for n in (0, 4))
    assert read_settings(dense)["model"]["moe"]["top_k"] == 1 and read_settings(sparse)["model"]["moe"]["top_k"] == 2
    assert done.stdout.count("warning: model.moe.top_k needs model.moe.num_experts > 0, but it is 2") == 1
    # What is printed for going on is of the one run.
    again = [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("continue ")]
    assert ["model.moe.top_k=1" in words for words in again] == [True, False]


def test_numbers_in_overrides_are_no_truth_values() -> None:
    assert [override("key", value) for value in (1, 0, True, None)] == ["key=1", "key=0", "key=true", "key=null"]
