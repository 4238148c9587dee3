"""The runner of a day on a GPU: what fails, hangs or is killed costs nothing that was measured. Needs no GPU."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import day, report
from tests.training.helpers import ROOT

GOOD = "from tests.gpu.stages.common import emit; emit('first', value=1.5); emit('second', value=2)"


def stage(tmp_path: Path, script: str, deadline: float = 60.0, name: str = "gemm") -> str:
    return day.run_stage(name, tmp_path, deadline, rehearse=True, command=[sys.executable, "-c", script])


def test_a_stage_that_fails_hangs_or_lacks_a_package_leaves_the_others_alone(tmp_path: Path) -> None:
    assert stage(tmp_path, "raise RuntimeError('the card fell off the bus')") == "failed with 1"
    started = time.monotonic()
    child = "subprocess.run(['sleep', '600'])"
    hangs = f"import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); {child}"
    day_grace, day.GRACE = day.GRACE, 0.5
    try:
        assert stage(tmp_path, hangs, deadline=2.0).startswith("out of time")
    finally:
        day.GRACE = day_grace
    assert time.monotonic() - started < 30
    lacks = "from tests.gpu.stages.common import attempt; attempt('triton', lambda: __import__('no_such_package'))"
    assert stage(tmp_path, lacks) == "done"
    assert stage(tmp_path, GOOD) == "done"
    rows = day.read(tmp_path / "day.jsonl")
    assert next(row["status"] for row in rows if "status" in row) == "failed with 1"
    assert "the card fell off the bus" in rows[0]["said"]
    assert [row["what"] for row in rows if "what" in row] == ["triton", "first", "second"]
    assert "ModuleNotFoundError: No module named 'no_such_package'" in report.overview(rows)


def test_a_kill_at_any_time_leaves_whole_lines(tmp_path: Path) -> None:
    script = "from tests.gpu.day import append; from pathlib import Path; import itertools\n"
    script += (
        f"for n in itertools.count(): append(Path({str(tmp_path)!r}) / 'day.jsonl', {{'what': 'x' * 9000, 'n': n}})"
    )
    for seed in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
        path = tmp_path / "day.jsonl"
        before = len(day.read(path))
        deadline = time.monotonic() + 60
        while len(day.read(path)) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(seed).random() / 20)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for line in path.read_bytes().splitlines():
            json.loads(line)
        assert len(day.read(path)) > before
    with path.open("ab") as file:
        file.write(b'{"what": "to')  # what a file system may leave of the last one
    assert all("what" in row for row in day.read(path))


def test_no_stage_is_begun_without_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert day.main(["--out", str(tmp_path / "out"), "--seconds", "1", "--stages", "gemm", "train"]) == 1
    rows = day.read(tmp_path / "out" / "day.jsonl")
    assert [row["status"] for row in rows] == ["not begun: no time was left"] * 2


def test_every_stage_has_its_module_and_they_fit_in_one_command() -> None:
    for name in day.STAGES:
        assert (ROOT / "tests" / "gpu" / "stages" / f"{name}.py").is_file()


def test_the_report_fills_the_tables_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    document.write_text(
        "before\n<!-- gpu: correctness -->\nold\n<!-- end -->\nbetween\n<!-- gpu: steps -->\nkept\n<!-- end -->\n"
    )
    rows = [
        {
            "stage": "ceilings",
            "what": "versions",
            "device": "NVIDIA H100",
            "torch": "2.11.0",
            "triton": "3.6.0",
            "driver": "1",
        },
        {"stage": "ceilings", "what": "product", "size": 8192, "tflops": 798.2},
        {
            "stage": "correctness",
            "what": "norm",
            "errors": {"forward": 0.001, "input": 0.002},
            "bar": 0.005,
            "passed": True,
        },
        {"stage": "correctness", "what": "loss", "error": "OutOfMemoryError: 1 | 2"},
        {"stage": "correctness", "status": "done", "seconds": 3.0, "said": ""},
    ]
    assert report.write(rows, [document]) == ["correctness"]
    text = document.read_text()
    assert "old" not in text and "between\n<!-- gpu: steps -->\nkept\n<!-- end -->" in text
    assert "NVIDIA H100, torch 2.11.0" in text and "798 TFLOP/s in a bf16 product of 8192³" in text
    assert "| norm | 0.002 | input, at most 0.005 |" in text and "| loss | failed | OutOfMemoryError: 1 / 2 |" in text
    assert report.write(rows, [document]) == ["correctness"] and document.read_text() == text


def test_the_documents_have_the_marks_that_the_report_fills() -> None:
    marks = {m[1] for name in ("kernels", "speed") for m in report.MARK.findall((ROOT / f"docs/{name}.md").read_text())}
    assert marks == set(report.TABLES)


def test_every_trainer_takes_a_step(tmp_path: Path) -> None:
    """The stage of whole steps, each trainer in a process of its own as there; ours in FP8 needs the interpreter."""
    environment = os.environ | {"DAY_REHEARSE": "1", "DAY_OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.stages.steps", "measure"]
    names = ("ours bf16", "megatron", "transformers")
    started = [
        subprocess.Popen([*command, name, "tiny"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    for name, process in zip(names, started, strict=True):
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, name
        assert json.loads(printed.splitlines()[-1])["seconds"] > 0


def test_the_card_is_named_by_the_start_table_where_ceilings_were_not_measured() -> None:
    rows = [{"stage": "steps", "what": "x", "table": [["device", "NVIDIA H200", "140 GiB"]]}]
    assert report.card(rows) == "NVIDIA H200.\n"
    rows.append({"stage": "ceilings", "what": "versions", "device": "H100", "torch": "2.11"})
    assert report.card(rows) == "H100, torch 2.11.\n"
