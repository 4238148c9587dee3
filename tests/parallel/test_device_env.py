"""What is set for CUDA before torch starts, for every way of starting."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from parallel import device_env
from parallel.device_env import device_variables, may_have_gpu, set_device_variables
from tests.training.helpers import ROOT


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ],
)
def test_what_the_user_set_stays(env: dict[str, str], wanted: dict[str, str]) -> None:
    mine = dict(env)
    set_device_variables(mine)
    assert mine.pop("TORCH_FR_BUFFER_SIZE") == "2000"
    assert mine == env | wanted
    assert device_variables(mine) == ", ".join(f"{k}={v}" for k, v in sorted(mine.items()))


def test_where_there_may_be_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.11.0")
    monkeypatch.setattr(device_env, "GPU_DRIVERS", (str(tmp_path / "none"), str(tmp_path / "driver")))
    assert not may_have_gpu({})
    (tmp_path / "driver").touch()
    shown = ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"})
    assert [may_have_gpu(env) for env in shown] == [True, True, False, False]
    monkeypatch.setattr(metadata, "version", lambda name: "2.11.0+cpu")
    assert not may_have_gpu({})


def test_who_sizes_the_flight_recorder_is_heeded() -> None:
    mine = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "10"}
    set_device_variables(mine)
    assert "TORCH_FR_BUFFER_SIZE" not in mine


SHOW = """
import os, sys, launch.cli, launch.train
assert "torch" not in sys.modules, "too late: torch is imported"
def show(config):
    print("torch" in sys.modules, os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], os.environ["PYTORCH_ALLOC_CONF"])
    return 0
from conf.schema import Config
launch.cli.command(Config, "config", show)
"""


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}])
def test_they_are_set_before_torch_is_imported(launcher: dict[str, str]) -> None:
    """Alone and under torchrun: the command itself sets them."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    env = {k: v for k, v in os.environ.items() if k not in names} | launcher
    command = [sys.executable, "-c", SHOW]
    printed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed.split() == ["False", "1", "expandable_segments:True"]
