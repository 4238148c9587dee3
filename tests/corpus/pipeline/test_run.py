"""Preparation at scale on this machine: the same tokens however it is run, restarted and read."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed: bash launch/setup.sh data")
from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

from conf.commands import PrepareSlurmConfig
from conf.schema import DataConfig
from corpus.pipeline import executors, run
from corpus.pipeline.account import Account
from corpus.pipeline.plan import Plan, divide, new_plan
from corpus.prepare import prepare
from corpus.shards import read_manifest
from launch.prepare import main
from tests.corpus.helpers import token_range
from tests.corpus.pipeline.helpers import STEPS, content, documents_of, prose, settings, write_corpus

ROOT = Path(__file__).parents[3]
MORE = {"text_key": "text", "strict": False, "eod_token": "<eod>", "samples": 3, "tokenizer": []}
"""The other fields of a plan."""


def test_steps_remove_the_same_with_any_number_of_workers(tmp_path, capsys):
    texts = write_corpus(tmp_path)
    assert main(settings(tmp_path, "one", workers=1)) == 0
    printed = capsys.readouterr().out
    assert main(settings(tmp_path, "two", workers=2)) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    # The first of equal documents is kept; of near-duplicates one is.
    copy, near, short = texts[15:18]
    assert (copy, near, short) == (texts[2], texts[1] + " The end.", "too short")
    originals = [*texts[:15], *texts[18:]]
    kept = documents_of(tmp_path / "one")
    assert kept in (originals, [texts[0], *texts[2:15], near, *texts[18:]])
    assert "3.jsonl: 1 row skipped (an error with strict=true): line 4 is not valid JSON" in printed
    summary = {entry["step"]: entry for entry in json.loads((tmp_path / "one" / "summary.json").read_text())}
    assert [summary[name]["removed"] for name in ("gopher_quality", "exact", "minhash", "pii")] == [1, 1, 1, 0]
    ((_, where, reason, text),) = summary["gopher_quality"]["samples"]
    assert (where, reason, text) == (f"{tmp_path}/3.jsonl document 3", "gopher_short_doc", "too short")
    assert 'gopher_short_doc 1: "too short"' in printed and "removed 1 (4.3%)" in printed


def test_without_steps_the_tokens_are_those_of_one_process(tmp_path, capsys):
    """And data=megatron reads the folder as one data set."""
    texts = write_corpus(tmp_path, files=2)
    assert main(settings(tmp_path, "shards", [], workers=2)) == 0
    folder = tmp_path / "shards"
    words = f'train on it: data=megatron "data.files=[{folder}]" data.tokenizer={folder}/tokenizer.json'
    assert words in capsys.readouterr().out.replace("'", '"')
    plain = settings(tmp_path, "plain", [], executor=None, task_mib=256.0)
    assert main(plain) == 0
    assert (tmp_path / "plain.tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    shards = [folder / f"shard_{rank:05d}" for rank in range(2)]
    assert (tmp_path / "plain.bin").read_bytes() == b"".join(Path(f"{s}.bin").read_bytes() for s in shards)
    assert documents_of(folder) == texts
    data = DataConfig(kind="megatron", files=[str(folder)], tokenizer=f"{folder}/tokenizer.json", valid_fraction=0.2)
    data.cache_dir = str(tmp_path / "cache")
    prepared = prepare(data, vocab_size=300, sequence_length=16)
    assert [source.num_documents for source in prepared.train + prepared.valid] == [4, 6, 1, 2]
    manifest = read_manifest(folder)
    assert manifest["num_tokens"] == len(token_range(str(tmp_path / "plain"), 0, len(texts)))
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert not (tmp_path / "shards.work").exists()


def test_objects_are_prepared_as_local_files(tmp_path):
    write_corpus(tmp_path, files=2)
    assert main(settings(tmp_path, "here", [])) == 0
    assert main(settings(tmp_path, "there", [], input=f"file://{tmp_path}/*.jsonl")) == 0
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    assert here.keys() == there.keys() and len(here) == 7  # a tokenizer, two pairs, and two files that name paths
    assert all(here[name] == there[name] for name in here.keys() - {"manifest.json", "summary.json"})
    plan = [new_plan(tmp_path / "x", [f"file://{tmp_path}/0.jsonl"], [], 1.0, **MORE).stamps for _ in range(2)]
    assert plan[0] == plan[1]
    os.utime(tmp_path / "0.jsonl", (1, 1))
    assert new_plan(tmp_path / "x", [f"file://{tmp_path}/0.jsonl"], [], 1.0, **MORE).stamps != plan[0]


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    """First a worker is killed, then the command with its workers: finished tasks are not repeated."""
    for number in range(40):
        rows = [json.dumps({"text": prose(100 * number + n)}) for n in range(3)]
        (tmp_path / f"{number:02d}.jsonl").write_text("\n".join(rows))
    steps = ["normalize", "exact"]
    command = [sys.executable, "-m", "launch.prepare", f"input=[{tmp_path}/*.jsonl]", f"output={tmp_path}/made"]
    command += ["executor=local", "task_mib=1e-6", "vocab_size=300", f"prepare.steps=[{','.join(steps)}]"]
    work = tmp_path / "made.work"

    def start(tasks: int) -> "subprocess.Popen[str]":
        """The command, after so many tasks are complete."""
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while len(list(work.glob("stages/*/completions/*"))) < tasks:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.002)
        return process

    process = start(1)
    os.kill(_workers(process.pid)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and "a worker was killed" in error and "Traceback" not in error
    process = start(len(list(work.glob("stages/*/completions/*"))) + 1)
    workers = _workers(process.pid)
    process.kill()
    process.communicate(timeout=100)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they end with their command
        time.sleep(0.01)
    assert not (tmp_path / "made").exists()
    done = {path.relative_to(work): path.stat().st_mtime_ns for path in work.glob("stages/*/completions/*")}
    assert 2 <= len(done) < 40 + 1 + 40 + 1
    with monkeypatch.context() as patch:
        patch.setattr(run.shutil, "rmtree", lambda *_, **__: None)  # keep the work folder, to look at it
        assert main(settings(tmp_path, "made", steps)) == 0
    assert {name: (work / name).stat().st_mtime_ns for name in done} == done
    assert main(settings(tmp_path, "at_once", steps)) == 0
    assert content(tmp_path / "made") == content(tmp_path / "at_once")


def _workers(command: int) -> list[int]:
    """The worker processes of a command: the children of its server of processes."""
    children = Path("/proc/{0}/task/{0}/children")
    servers = Path(str(children).format(command)).read_text().split()
    return [int(pid) for server in servers for pid in Path(str(children).format(server)).read_text().split()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "cloud"}, "executor=cloud is not one of local, slurm, ray"),
        ({"executor": None}, "prepare.steps need an executor: add executor=local"),
        ({"workers": 0}, r"workers=0 must be >= 1; the nearest is workers=1"),
        ({"task_mib": 0.0}, r"task_mib=0\.0 must be > 0"),
        ({"slurm": PrepareSlurmConfig(partition="cpu")}, "slurm have no effect without executor=slurm"),
        ({"executor": "slurm", "slurm": PrepareSlurmConfig(sbatch=["account=x"])}, "not of the form --NAME=VALUE"),
        ({"strict": True}, r"3\.jsonl line 4 is not valid JSON"),
        ({"text_key": "body"}, r"has no field 'body'; set text_key to one that it has: text"),
        pytest.param(
            {"executor": "ray"},
            r'needs Ray: pip install "ray\[default\]"',
            marks=pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed"),
        ),
    ],
)
def test_what_is_refused_leaves_nothing_behind(tmp_path, changes, message):
    write_corpus(tmp_path)
    steps = ["gopher_quality"] if changes == {"executor": None} else []
    before = sorted(tmp_path.iterdir())
    changes = {"tokenizer": None} | changes
    with pytest.raises(ValueError, match=message):
        main(settings(tmp_path, "refused", steps, **changes))
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_left_is_an_error_that_says_what_removed_it(tmp_path):
    write_corpus(tmp_path, files=1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"(?s)no document is left.*gopher_quality .* removed 8 \(100\.0%\)"):
        main(settings(tmp_path, "empty", [{"gopher_quality": {"min_doc_words": 100000, "max_doc_words": None}}]))
    assert sorted(tmp_path.iterdir()) == before


def test_a_work_folder_of_other_settings_is_not_used(tmp_path):
    write_corpus(tmp_path, files=1)
    plan = _plan(tmp_path)
    plan.save()
    with pytest.raises(ValueError, match=r"was begun with other settings \(.*eod_token.*\): give these again"):
        run.begin_or_resume(Plan(**{**plan.__dict__, "eod_token": "<end>"}))
    assert run.begin_or_resume(_plan(tmp_path))


def test_shards_that_do_not_fit_their_manifest_are_refused(tmp_path):
    write_corpus(tmp_path, files=1)
    assert main(settings(tmp_path, "made", [])) == 0
    (tmp_path / "other.json").write_text((tmp_path / "made" / "tokenizer.json").read_text() + " ")
    data = DataConfig(kind="megatron", files=[f"{tmp_path}/made"], tokenizer=f"{tmp_path}/other.json")
    data.cache_dir = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"another tokenizer than data\.tokenizer=.*; set data\.tokenizer=.*made/tok"):
        prepare(data, vocab_size=300, sequence_length=16)
    with (tmp_path / "made" / "shard_00000.bin").open("ab") as file:
        file.write(b"x")
    data.tokenizer = f"{tmp_path}/made/tokenizer.json"
    with pytest.raises(ValueError, match=r"shard_00000\.bin has \d+ bytes, but manifest\.json says"):
        prepare(data, vocab_size=300, sequence_length=16)
    data.files = [str(tmp_path)]
    with pytest.raises(ValueError, match=r"is a folder without manifest\.json"):
        prepare(data, vocab_size=300, sequence_length=16)


def test_files_are_divided_in_order(tmp_path):
    paths = [str(tmp_path / name) for name in "abcde"]
    for path, size in zip(paths, (600, 500, 2000, 10, 20), strict=True):
        Path(path).write_bytes(b"x" * size)
    a, b, c, d, e = paths
    assert divide(paths, 1100 / 2**20) == [[a, b], [c], [d, e]]


def test_samples_do_not_depend_on_how_tasks_are_divided():
    def account(numbers: range) -> Account:
        found = Account("step", keep=2)
        for n in numbers:
            found.came("text")
            found.remove(f"document {n}", "why", f"text {n}")
        return found

    parts = account(range(7))
    parts.add(account(range(7, 20)))
    whole = account(range(20))
    assert sorted(parts.samples) == sorted(whole.samples) and len(whole.samples) == 2
    assert (parts.seen, parts.removed, parts.reasons) == (20, 20, {"why": 20})


def test_the_arguments_are_those_of_datatrove_s_executors(tmp_path):
    write_corpus(tmp_path, files=1)
    plan = _plan(tmp_path)
    inspect.signature(RayPipelineExecutor).bind([], **executors.ray_options(plan, plan.stages[0], 4))
    options = executors.slurm_options(plan, plan.stages[0], 4, PrepareSlurmConfig(sbatch=["--account=lab"]))
    inspect.signature(SlurmPipelineExecutor).bind([], **options)
    arguments = executors.SlurmExecutor([], **options).get_sbatch_args(3)
    assert arguments["account"] == "lab" and arguments["array"] == "0-2%1" and "partition" not in arguments


def _plan(folder: Path) -> Plan:
    files, steps = [f"{folder}/0.jsonl"], run.read_steps(STEPS)
    return new_plan(folder / "planned", files, steps, 256.0, **MORE)


def _tokenizer(folder: Path) -> str:
    from corpus.tokenizer import Tokenizer

    path = str(folder / "given.json")
    Tokenizer.train(["abc"], vocab_size=280, eod_token="<|endoftext|>").save(path)
    return path
