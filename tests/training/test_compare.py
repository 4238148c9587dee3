"""The table of runs."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conf.schema import Config
from launch import compare
from training.flops import model_cost
from training.loss_plot import curves, smoothed

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
        {"step": n, "loss": loss, "tokens": 8192 * n, "tokens_per_second": 100.0 * n, "dropped_fraction": 0.25}
        for n, loss in enumerate(losses, 1)
    ]
    rows += [{"step": len(losses), "val_loss": val, "val_bits_per_byte": val / 2}] if val else []
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    return path


FIGURES = ["steps", "loss", "held-out", "bits/byte", "tokens/s", "dropped", "params", "active", "FLOPs/token", "FLOPs"]


def table(capsys: pytest.CaptureFixture[str], *paths: Path) -> list[list[str]]:
    assert compare.main([str(path) for path in paths]) == 0
    return [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_a_row_per_run_and_a_column_per_setting_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    one = write_run(tmp_path / "one", [3.0, 2.5, 2.25], val=2.5, optim__lr=1e-3, run__name="one")
    other = write_run(tmp_path / "other", [3.0], optim__lr=2e-3, train__deterministic=True, run__name="other")
    head, first, second = table(capsys, one, other)
    assert head == ["run", "deterministic", "lr", *FIGURES]
    cost = model_cost(Config().model, 256)
    parameters = f"{cost.total / 1e6:.3g} M"
    flops = [parameters, parameters, f"{cost.flops_per_token / 1e6:.3g} M"]  # a dense model
    total = f"{cost.flops_per_token * 3 * 8192:.2e}"
    assert first == ["one", "false", "0.001", "3/200", "2.2500", "2.5000", "1.250", "200", "25.0%", *flops, total]
    assert second[:8] == ["other", "true", "0.002", "1/200", "3.0000", "-", "-", "100"]


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_readable_at_any_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    runs = [
        write_run(tmp_path / f"tiny_switch-20261122-03351{n}", [3.0], val=2.5, model__moe__top_k=n + 1, optim__lr=n / 7,
                  data__files=["/a/very/long/path/to/some/files/of/a/run.jsonl" * (n + 1)])
        for n in range(3)
    ]  # fmt: skip
    assert compare.main([str(path) for path in runs]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    blocks = out.rstrip("\n").split("\n\n")
    assert len(blocks) <= 1 + 260 // width
    words = [re.split(r"  +", block.splitlines()[0].strip()) for block in blocks]
    assert [word for line in words for word in line if word != "#"] == ["run", "top_k", "files", "lr", *FIGURES]
    for n, path in enumerate(runs):
        if len(blocks) > 1:
            assert [block.splitlines()[n + 1].split()[0] for block in blocks] == [str(n + 1)] * len(blocks)
        assert path.name in blocks[0] and f"{n / 7}" in out


def test_names_that_are_alike_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, [3.0], optim__min_lr=n) for n, name in enumerate(("a/run", "b/run", "b/other"))]
    assert [row[0] for row in table(capsys, *runs)] == ["run", "a/run", "b/run", "other"]


def test_settings_that_end_alike_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", [3.0], eval__every=10, model__moe__every=1)
    other = write_run(tmp_path / "other", [3.0], eval__every=20, model__moe__every=2)
    assert table(capsys, one, other)[0][1:3] == ["moe.every", "eval.every"]


def test_names_cannot_reach_the_terminals_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "a\x1b[2J\nb", [3.0], model__name="x\x1b]0;y\x07\nz")
    shown = table(capsys, one, write_run(tmp_path / "other", [3.0]))
    assert len(shown) == 3 and shown[1][0] == r"a\x1b[2J\nb" and r"x\x1b]0;y\x07\nz" in shown[1]
    assert compare.main([str(tmp_path / "no\x1b[2J")]) == 2
    assert r"no\x1b[2J" in capsys.readouterr().err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", [3.0, 2.0], val=2.5, optim__lr=1e-3)
    other = write_run(tmp_path / "other", [], optim__lr=2e-3)
    assert compare.main([str(one), str(other), "format=json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["path"] == str(one) and first["settings"] == {"optim.lr": 1e-3}
    assert (first["loss"], first["val_loss"], first["tokens_per_second"]) == (2.0, 2.5, 150.0)
    assert first["parameters"] == model_cost(Config().model, 256).total
    assert first["flops"] == 2 * 8192 * first["flops_per_token"]
    assert second["loss"] is None and second["flops"] is None
    assert compare.main([str(one), "format=yaml"]) == 2
    assert "format=yaml is not one of table, json" in capsys.readouterr().err


def test_a_folder_of_runs_stands_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / name, [])
    assert [row[0] for row in table(capsys, tmp_path)[1:]] == ["a", "b"]


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


def test_a_chart_of_the_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points are means of the last N logged losses; what was not logged is not drawn."""
    assert smoothed(np.array([4.0, 2.0, 3.0, 1.0]), 2).tolist() == [4.0, 3.0, 2.5, 2.0]
    assert smoothed(np.array([4.0, 2.0]), 1).tolist() == [4.0, 2.0]
    run = write_run(tmp_path / "one", [3.0, 2.5, 2.25])
    line = curves(compare.summarise(run))
    assert line["tokens"].tolist() == [8192, 16384, 24576] and "seconds of training steps" not in line
    for smooth in ("0", "x"):
        assert compare.main([str(run), f"smooth={smooth}"]) == 2
        assert "nearest: smooth=10" in capsys.readouterr().err
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: bash launch/setup.sh plots")
    assert compare.main([str(run), f"plot={tmp_path / 'loss.png'}", "smooth=2"]) == 0
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert compare.main([str(run), f"plot={tmp_path / 'loss.doc'}"]) == 2
    assert "loss.png" in capsys.readouterr().err
