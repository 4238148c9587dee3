"""The table of runs."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.schema import Config
from launch import compare

ROOT = Path(__file__).resolve().parents[2]


def write_run(path: Path, losses: list[float], *, val: float | None = None, **changed: Any) -> Path:
    """A run directory; `changed` is dotted keys with __ for the dots."""
    settings = asdict(Config())
    for key, value in changed.items():
        *sections, name = key.split("__")
        section = settings
        for part in sections:
            section = section[part]
        section[name] = value
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    rows = [
        {"step": n, "loss": loss, "tokens_per_second": 100.0 * n, "dropped_fraction": 0.25}
        for n, loss in enumerate(losses, 1)
    ]
    rows += [{"step": len(losses), "val_loss": val, "val_bits_per_byte": val / 2}] if val else []
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    return path


def table(capsys: pytest.CaptureFixture[str], *paths: Path) -> list[list[str]]:
    assert compare.main([str(path) for path in paths]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_row_per_run_and_a_column_per_setting_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", [3.0, 2.5, 2.25], val=2.5, optim__lr=1e-3, run__name="one")
    other = write_run(tmp_path / "other", [3.0], optim__lr=2e-3, train__deterministic=True, run__name="other")
    head, first, second = table(capsys, one, other)
    settings = ["train.deterministic", "optim.lr"]
    assert head == ["run", *settings, "steps", "loss", "held-out", "bits/byte", "tokens/s", "dropped"]
    assert first == [str(one), "false", "0.001", "3/200", "2.2500", "2.5000", "1.250", "200", "25.0%"]
    assert second == [str(other), "true", "0.002", "1/200", "3.0000", "-", "-", "100", "25.0%"]


def test_a_folder_of_runs_stands_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / name, [])
    assert [row[0] for row in table(capsys, tmp_path)[1:]] == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("content", [None, "just text", "[1"])
def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "config.yaml").write_text(content)
    command = [sys.executable, "-m", "launch.compare", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"switchyard: error: {tmp_path} is not a run directory")
        and "\n  File" not in done.stderr
    )
