"""A run with everything that the recipes add, from the command line, on two simulated ranks."""

import json
import re
from pathlib import Path

import pytest

from tests.extensions.recipes import ROOT, recipe
from tests.training.helpers import command_line, start

NAMES = {
    "model.activation": "mishglu",
    "model.moe.score_function": "sqrtsoftplus",
    "optim.name": "lion",
    "optim.schedule": "inverse_sqrt",
    "logging.loggers": "[tensorboard,csv]",
    "data.kind": "csv",
}


@pytest.fixture
def module(tmp_path: Path) -> str:
    headings = re.findall(
        r"^### (.*)$", (ROOT / "CONTRIBUTING.md").read_text().split("## Extending\n")[1], re.MULTILINE
    )
    assert len(headings) == 9
    (tmp_path / "recipes_of_mine.py").write_text("\n\n".join(map(recipe, headings)))
    return "recipes_of_mine"


def test_a_run_with_extensions(module: str, tmp_path: Path) -> None:
    rows = "".join(f'"{number} green bottles hanging on the wall, {"la " * 30}"\n' for number in range(300))
    (tmp_path / "songs.csv").write_text(f"text\n{rows}")
    run_dir = tmp_path / "run"
    settings = [f"{key}={value}" for key, value in NAMES.items()]
    settings += [f"data.files=[{tmp_path}/songs.csv]", "train.steps=2", "checkpoint.every=2", "optim.lr=1e-4"]
    command = command_line(tmp_path / "songs.csv", run_dir, *settings)
    refused = start(command, PYTHONPATH=str(tmp_path))
    message = refused.communicate(timeout=120)[1]
    assert refused.returncode == 2 and "optim.name is one of adamw, muon, but lion is not available" in message, message
    trained = start([*command, f"extensions=[{module}]"], PYTHONPATH=str(tmp_path), NPROC="2")
    message = "".join(trained.communicate(timeout=300))
    assert trained.returncode == 0, message
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 and all(0 < line["router_first_gate"] <= 1 for line in steps)
    assert re.search(r"^optimizer +lion, torch +configured", (run_dir / "train.log").read_text(), re.MULTILINE)
    assert (run_dir / "metrics.csv").read_text().startswith("1,train/loss,")

    evaluate = [command[0], "-m", "launch.evaluate", f"checkpoint={run_dir}", "precision=fp32"]
    refused = start(evaluate, PYTHONPATH=str(tmp_path))
    message = refused.communicate(timeout=120)[1]
    # The run's modules are not imported.
    assert refused.returncode == 2 and "model.activation is one of" in message, message
    evaluated = start([*evaluate, f"extensions=[{module}]"], PYTHONPATH=str(tmp_path))
    message = "".join(evaluated.communicate(timeout=300))
    assert evaluated.returncode == 0 and "perplexity" in message, message


def test_a_module_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken_extension.py").write_text("1 / 0\n")
    absent, broken = "No module named 'absent_extension'", f"{tmp_path}/broken_extension.py, line 1: ZeroDivisionError"
    for module, why in (("absent_extension", absent), ("broken_extension", broken)):
        process = start(command_line(tmp_path, tmp_path / "run", f"extensions=[{module}]"), PYTHONPATH=str(tmp_path))
        message = process.communicate(timeout=60)[1]
        assert process.returncode == 2 and message.count("\n") == 1, message
        assert f"extensions: {module} cannot be imported: {why}" in message


@pytest.mark.parametrize("group", ["model", "precision", "extensions"])
@pytest.mark.parametrize("package", ["# @package _global_\n", ""])
def test_a_shared_preset_names_no_module(group: str, package: str, tmp_path: Path) -> None:
    """Not in a group of ours, nor in one that is named as a setting is."""
    (tmp_path / group).mkdir()
    (tmp_path / group / "shared.yaml").write_text(f"{package}extensions: [absent_extension]\n")
    python, *rest = command_line(tmp_path, tmp_path / "run")
    process = start([python, *rest[:2], f"--config-dir={tmp_path}", *rest[2:], f"{group}=shared"])
    message = process.communicate(timeout=60)[1]
    refusals = ("@package is not supported", "there is no setting model.extensions", "No match in the defaults list")
    assert process.returncode == 2 and any(refusal in message for refusal in refusals), message
