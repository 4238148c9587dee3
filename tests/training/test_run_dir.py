"""The run directory: names, and the command that continues a run."""

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conf.schema import Config, RunConfig
from corpus.prepare import Prepared
from launch.overrides import CONF
from launch.train import prepare_run
from tests.training.helpers import ROOT, tiny_config, write_corpus
from training import run_dir as run_dirs
from training.console import Console
from training.metrics import trim_rows
from training.run_dir import RunDir, default_name, load_config, open_run_dir
from training.run_files import write_atomically


def test_default_names() -> None:
    config = Config()
    config.model.name = "tiny"
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", default_name(config, {}))
    assert default_name(config, {"SLURM_JOB_ID": "17"}) == "tiny-17"
    array = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "3"}
    assert default_name(config, array) == "tiny-18_3"
    config.run.name = "mine"
    assert default_name(config, array) == "mine-18_3"


def test_runs_of_one_second_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    names = [open_run_dir(Config(), {}).path.name for _ in range(3)]
    assert names == ["custom-now", "custom-now-2", "custom-now-3"]


def test_the_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path / "run")))
    config.model.moe.capacity_factor = None
    config.train.profile = [1, 2]
    open_run_dir(config).adopt(config, None)
    assert load_config(tmp_path / "run") == config
    (tmp_path / "run" / "config.yaml").write_text("model: {width: 3}\n")
    with pytest.raises(ValueError, match="does not fit this version"):
        load_config(tmp_path / "run")


def test_a_run_is_continued_with_what_it_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "data=text",
        "data.files=[a b.txt]",
        "checkpoint.resume=false",
        "run.dir=old",
        "train.steps=5",
        "train.stop_after=2",
    ]
    run = RunDir(Path("runs/x"), created=False, continued=True, changed=[], overrides=given)
    monkeypatch.delenv("NPROC", raising=False)
    words = shlex.split(run.command(10))
    assert words[:2] == ["bash", "launch/train.sh"]
    assert words[2:] == ["data=text", "data.files=[a b.txt]", "run.dir=runs/x", "train.steps=10"]
    stages = "data.stages=[{step: 6, weights: [1, 0]}]"
    words = shlex.split(run.command(10, [stages, "data.files=[c]"]))
    assert words[2:] == ["data=text", "run.dir=runs/x", "train.steps=10", stages, "data.files=[c]"]
    monkeypatch.setenv("NPROC", "4")
    assert run.command(10).startswith("NPROC=4 bash ")
    awkward = Path("runs/a b=1,(2) it's ${x}")
    run = RunDir(awkward, created=False, continued=True, changed=[], overrides=["++train.steps=5"])
    words = shlex.split(run.command(10).removeprefix("NPROC=4 "))[2:]
    directory, steps = OverridesParser.create().parse_overrides(words)
    assert OmegaConf.create({"dir": directory.value()}).dir == str(awkward) and steps.value() == 10


def test_folders_of_presets_belong_to_the_command_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composed as by launch/cli.py."""
    folders = [tmp_path / "my presets", tmp_path / "others"]
    for folder, name in zip(folders, ("mine", "theirs"), strict=True):
        (folder / "experiment").mkdir(parents=True)
        (folder / "experiment" / f"{name}.yaml").write_text("# @package _global_\ntrain:\n  steps: 7\n")
    given = [f"--config-dir={folders[0]}", f"hydra.searchpath=[file://{folders[1]}]", "+train.seed=3"]
    program = (
        "import sys, hydra\nfrom conf.schema import Config\nfrom training import run_dir\n"
        f"@hydra.main(version_base='1.3', config_path={str(CONF)!r}, config_name=None)\n"
        "def task(_): print(run_dir.open_run_dir(Config()).command(9))\ntask()"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [sys.executable, "-c", program, *given, "hydra.output_subdir=null", "hydra.run.dir=."]
    printed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert shlex.split(printed)[2:5] == given


def open_at_once(barrier: Any, found: Any) -> None:
    """Ten directories (function for a process)."""
    for _ in range(10):
        barrier.wait()
        found.put(open_run_dir(Config(), {}).path.name)


def test_runs_opened_at_one_instant_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    fork = multiprocessing.get_context("fork")
    barrier, found = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=open_at_once, args=(barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    names = [found.get(timeout=60) for _ in range(40)]
    for process in processes:
        process.join()
    assert sorted(names) == sorted(p.name for p in (tmp_path / "runs").iterdir()) and len(set(names)) == 40


def test_a_start_that_fails_removes_only_an_empty_directory_of_its_own(tmp_path: Path) -> None:
    """While this one prepares its data, another makes, checks and uses the directory."""
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run")
    config.data.files = [str(tmp_path / "nowhere.txt")]

    def fail(opened: run_dirs.RunDir) -> None:
        with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
            prepare_run(config, opened, Console())

    fail(open_run_dir(config))
    assert not (tmp_path / "run").exists()
    mine, others = open_run_dir(config), open_run_dir(config)
    assert mine.created and not others.created
    others.adopt(config, None)
    others.take_over(None)
    (others.checkpoints / "step_00000001").mkdir(parents=True)
    before = sorted(tmp_path.rglob("run/**/*"))
    fail(mine)
    assert sorted(tmp_path.rglob("run/**/*")) == before and len(before) >= 4
    # The other way round: what was removed while it was still empty is made again.
    config.run.dir = str(tmp_path / "second")
    mine, others = open_run_dir(config), open_run_dir(config)
    fail(mine)
    others.adopt(config, None)
    assert load_config(tmp_path / "second") == config


def test_starts_of_one_instant_leave_the_settings_of_the_owner(tmp_path: Path) -> None:
    """Two take a new directory over at once, again and again: files are whole, and of the one that may write."""
    tokenizers = [tmp_path / f"{n}.json" for n in range(2)]
    for path in tokenizers:
        path.write_text("{}")

    def start(n: int, barrier: threading.Barrier, owners: dict[int, Any]) -> None:
        config = Config(run=RunConfig(dir=str(path), name=str(n)))
        opened = open_run_dir(config)
        barrier.wait()
        opened.adopt(config, str(tokenizers[n]))
        owners[n] = opened.take_over(str(tokenizers[n]))
        opened.keep_settings(owners[n], config, Prepared([], [], str(tokenizers[n]), 1, 0, None, None, []))

    for attempt in range(8):
        path, owners = tmp_path / str(attempt), {}
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=start, args=(n, barrier, owners)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (holder,) = [n for n, owner in owners.items() if owner.holds()]
        assert load_config(path).run.name == str(holder)
        left = {".lock", "config.yaml", "data.json", "owner", "tokenizer.json"}
        assert {p.name for p in path.iterdir()} == left


def test_a_lock_that_is_never_released_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dirs, "_LOCK_PATIENCE", 0.1)
    opened = open_run_dir(Config(run=RunConfig(dir=str(tmp_path))))
    with run_dirs._locked(tmp_path / ".lock"), pytest.raises(ValueError, match=r"another process has kept .*lock"):
        opened.take_over(None)


@pytest.mark.parametrize(
    "name", ["checkpoints", "checkpoints/step_00000003", "metrics.jsonl", "train.log", "config.yaml"]
)
def test_what_cannot_be_read_is_named_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The superuser may read everything, so that the answer of the system is played."""
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    for file in ("metrics.jsonl", "train.log"):
        (tmp_path / file).write_text('{"step": 5}\n')
    config = Config(run=RunConfig(dir=str(tmp_path)))
    write_atomically(tmp_path / "config.yaml", b"model: {}\n")
    (tmp_path / "checkpoints" / "step_00000004").write_text("not a directory, and found to be damage later")
    assert open_run_dir(config).continued
    access, listdir, closed = os.access, os.listdir, tmp_path / name

    def no_list(path: Path) -> list[str]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    monkeypatch.setattr(os, "listdir", no_list)
    with pytest.raises(ValueError, match=f"(?i)permission denied: .*{name}"):
        open_run_dir(config)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 5}\n'


def test_settings_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"run: {name: caf\xe9}\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.yaml is not UTF-8"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "3", "[]", "{}", '{"train": 3, "valid": []}', "{"])
def test_what_a_run_keeps_may_be_torn(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    data = Prepared([], [], None, 1, None, None, None, [])
    assert RunDir(tmp_path, created=False, continued=True, changed=[], overrides=[]).changed_data(data) is None

    (tmp_path / "config.yaml").write_text(text)
    if text != "{}" and not text.startswith('{"train"'):
        with pytest.raises(ValueError, match=f"{tmp_path} is not a run directory"):
            load_config(tmp_path)


def test_rows_that_are_no_rows_are_dropped(tmp_path: Path) -> None:
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"step": 1}\n' + "[" * 100_000 + '\nnull\n{"step": 2}\n{"step"')
    trim_rows(rows, last_step=2)
    assert rows.read_text() == '{"step": 1}\n{"step": 2}\n'
