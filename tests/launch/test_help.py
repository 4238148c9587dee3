"""--help, --version and shell completion."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conf.commands import (
    ChatConfig,
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
)
from conf.inspect_data_config import InspectDataConfig
from conf.schema import Config
from launch.help_text import COMPLETION, help_text, settings
from launch.settings import setting_types

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "schema",
    [
        Config,
        CheckConfig,
        PrepareConfig,
        InspectDataConfig,
        EvaluateConfig,
        GenerateConfig,
        ChatConfig,
        ImportConfig,
        ExportConfig,
    ],
)
def test_every_setting_has_a_summary_of_one_line(schema: type) -> None:
    found = list(settings(schema))
    for key, _, summary in found:
        assert summary and "\n" not in summary and len(summary) <= 150, key
    sections = {key for key in setting_types(schema) if any(k.startswith(f"{key}.") for k in setting_types(schema))}
    assert [key for key, _, _ in found] == [key for key in setting_types(schema) if key not in sections]


def test_help_names_the_command_and_only_its_settings() -> None:
    import launch.generate
    import launch.train

    text = help_text(GenerateConfig, "generate", launch.generate.main)
    assert "Usage: python -m launch.generate " in text and "  prompt= " in text and "model=" not in text
    assert 'eval "$(python -m launch.generate -sc install=bash)"' in text
    text = help_text(Config, "config", launch.train.main)
    assert "Usage: python -m launch.train " in text and "|switch_base_8|tiny_dense|tiny_switch\n" in text
    assert "  train.steps=200                            Optimizer steps of the whole schedule.\n" in text
    assert " Number of key/value heads (grouped-query attention). null: num_attention_heads.\n" in text


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "launch.train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_version_is_ours() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version") == f"switchyard {version}\n"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("python -m launch.train model=tiny_s", ["model=tiny_switch"]),
        ("bash launch/train.sh train.ste", ["train.steps="]),
        ("python -m launch.generate prompt", ["prompt=", "prompts="]),
        ("python -m launch.train precision=b", ["precision=bf16"]),
        ("python setup.py x", []),
    ],
)
def test_shell_completion(line: str, completed: list[str]) -> None:
    script = COMPLETION.replace("@PYTHON@", sys.executable)
    words = " ".join(f"'{word}'" for word in line.split())
    ask = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE='{line}'; _switchyard_complete"
    shell = f'{script}\n{ask}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == completed
    assert done.stderr == ""


def test_completion_is_installed_by_the_command() -> None:
    assert "_switchyard_complete" in run("-sc", "install=bash")
