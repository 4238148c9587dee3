"""The Hydra door, through a tiny command that prints what it got."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import sys
from conf.schema import Config
from launch.cli import command

def main(config: Config) -> int:
    assert isinstance(config, Config)
    assert "torch" not in sys.modules
    print("got", config.train.steps, config.optim.lr, config.model.name, config.run.name)
    if config.train.seed == 1:
        raise ValueError("two things\\n  are wrong")
    if config.train.seed == 2:
        raise RuntimeError("a bug")
    return config.train.seed if config.train.seed < 100 else 0

if __name__ == "__main__":
    command(Config, "config", main)
"""


@pytest.fixture
def door(tmp_path):
    """Runs the command in an empty folder."""
    (tmp_path / "tiny.py").write_text(COMMAND)
    presets = tmp_path / "presets" / "model"
    presets.mkdir(parents=True)
    (presets / "unknown_key.yaml").write_text("num_layer: 3\n")
    (presets / "wrong_type.yaml").write_text("num_layers: three\n")
    (presets / "torn.yaml").write_text("name: a\n  num_layers: [3\n")
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {"PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tmp_path / "tiny.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return run


# what is typed, and what the message must name
MISTAKES = [
    (["lr=1"], ["no setting lr;", "optim.lr?"]),
    (["+lr=1"], ["no setting lr;", "optim.lr?"]),
    (["++lr=1"], ["no setting lr;", "optim.lr?"]),
    (["~lr"], ["no setting lr;", "optim.lr?"]),
    (["model.moe.topk=1"], ["model.moe.topk;", "nearest is model.moe.top_k"]),
    (["+model.moe.topk=1"], ["nearest is model.moe.top_k"]),
    (["train.sed=1"], ["nearest is train.seed"]),
    (["every=1"], ["model.moe.every", "eval.every", "checkpoint.every"]),
    (["model.heads=3"], ["nearest is model.num_attention_heads"]),
    (
        ["fp8.param_gather=true"],
        ["no setting fp8.param_gather; parameters are kept and gathered in bf16", "fp8.kernels=te"],
    ),
    (["zebra.widgets=8"], ["no setting zebra.widgets; --help lists all"]),
    (["optimizer.lr=1"], ["did you mean optim.lr?"]),
    (["optim.kind=muon"], ["no setting optim.kind; the optimizer is chosen by optim.name: adamw or muon"]),
    (["evaluate.during=true"], ["eval_tasks.tasks are evaluated every eval_tasks.every steps"]),
    (["optim.amsgrad=1"], ["there are optim.name, optim.lr, ", "optim.beta1"]),
    (["optim={lr: 1, betta1: 2}"], ["no setting optim.betta1;", "nearest is optim.beta1"]),
    (["data.blend=[{wieght: 1}]"], ["no setting wieght in a BlendPart", "nearest is weight"]),
    (["modle=tiny_switch"], ["no setting modle", "nearest is model"]),
    (["model=tiny_swich"], ["nearest is model=tiny_switch", "switch_base_8, tiny_dense, tiny_switch"]),
    (["data=txt"], ["nearest is data=text", "blend, chat, megatron, preference, stdlib, text"]),
    (["train.steps=abc"], ["train.steps=abc", "an integer"]),
    (["train.steps=1.5"], ["train.steps=1.5", "an integer"]),
    (["train.steps=null"], ["train.steps=null", "an integer"]),
    (["train.stop_after=x"], ["train.stop_after=x", "an integer or null"]),
    (["optim.lr=fast"], ["optim.lr=fast", "a number"]),
    (["train.deterministic=maybe"], ["train.deterministic=maybe", "true or false"]),
    (["train.profile=[a]"], ["train.profile=a", "a list (each: an integer) or null"]),
    (["data.blend=[{weight: heavy}]"], ["weight=heavy", "a number"]),
    (["train=5"], ["train is a section", "train.steps"]),
    (["+train.steps=3"], ["train.steps exists already", "drop the +"]),
    (["~train.steps"], ["cannot be removed", "train.steps=VALUE"]),
    (["run.name=???"], ["run.name must be given"]),
    (["run.name=${no.such}"], ["run.name", "no.such"]),
    (["train.steps"], ["train.steps is not a setting", "key=value"]),
    (["train.profile=[1"], ["cannot read train.profile=[1"]),
    (["train.steps=1,2"], ["train.steps=1,2", "--multirun"]),
    (["--train.steps=3"], ["--train.steps=3", "without dashes"]),
    (["--config-name=nothing"], ["nothing"]),
    (["--config-dir=presets", "model=unknown_key"], ["in model/unknown_key.yaml", "nearest is model.num_layers"]),
    (["--config-dir=presets", "model=wrong_type"], ["in model/wrong_type.yaml", "num_layers=three", "an integer"]),
    (["--config-dir=presets", "model=torn"], ["torn.yaml", "line 2"]),
    (["train.seed=1"], ["two things\n  are wrong"]),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=lambda value: value[0])
def test_mistake_is_one_message_and_exit_code_2(door, arguments, named):
    result = door(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("switchyard: error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for part in named:
        assert part in result.stderr
    assert result.stdout == "" or arguments == ["train.seed=1"]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "got 650 0.012 tiny_switch None"),
        (["optim.lr=1", "++train.steps=7"], "got 7 1.0 tiny_switch None"),
        (["model=tiny_dense", "run.name='a b (c), d'"], "got 650 0.012 tiny_dense a b (c), d"),
    ],
)
def test_typed_settings_reach_the_command(door, arguments, printed):
    result = door(*arguments)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, printed, "")


def test_exit_code_is_what_the_command_returned(door):
    assert door("train.seed=75").returncode == 75


def test_other_exceptions_keep_their_traceback(door):
    result = door("train.seed=2")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and 'raise RuntimeError("a bug")' in result.stderr


def test_multirun_runs_all_and_exits_with_the_first_failure(door):
    result = door("--multirun", "train.seed=500,1,9", "train.steps=5,6")
    assert result.stdout.count("got 5") == result.stdout.count("got 6") == 3
    assert result.stderr.count("switchyard: error: two things") == 2
    assert result.returncode == 2


def test_help_and_config_are_shown(door, tmp_path):
    for arguments, part in ((["--help"], "train.steps=200 "), (["--cfg", "job"], "steps: 77")):
        result = door(*arguments, "train.steps=77")
        assert result.returncode == 0
        assert part in result.stdout and "got 77" not in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.py", "presets"}


def test_mistake_is_answered_within_a_second(door):
    """Of processor time, which other tests beside this one do not lengthen."""

    def seconds() -> float:
        before = os.times()
        door("lr=1")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 1.0
