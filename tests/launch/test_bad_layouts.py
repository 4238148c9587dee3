"""An invalid layout ends with exit code 2 and the violated rule before PyTorch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import atexit, runpy, sys
atexit.register(lambda: print("torch imported:", "torch" in sys.modules))
runpy.run_module("launch.train", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (6, ["parallel.tp=4"], "world_size % (parallel.tp * parallel.pp * parallel.cp) == 0, but 6 % 4 = 2"),
        (8, ["parallel.tp=8"], "model.num_attention_heads % parallel.tp == 0, but 2 % 8 = 2"),
        (3, ["parallel.ep=3"], "model.moe.num_experts % parallel.ep == 0, but 8 % 3 = 2"),
        (1, ["parallel.vpp=2"], "parallel.vpp needs parallel.pp > 1"),
        (3, ["parallel.pp=3"], "model.num_layers % parallel.pp == 0, but 4 % 3 = 1"),
        (
            2,
            ["parallel.pp=2", "parallel.pp_layers=[1,2]"],
            "== model.num_layers, but 1 + 2 = 3",
        ),
        (2, ["parallel.cp=2", "train.sequence_length=255"], "train.sequence_length % "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_layout_ends_with_the_rule_and_exit_code_2(tmp_path, ranks, overrides, expected):
    result = subprocess.run(
        [sys.executable, "-c", TRAIN, f"run.dir={tmp_path / 'run'}", *overrides],
        env={**os.environ, "NPROC": str(ranks)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr and "nearest" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == "torch imported: False\n"
    assert not (tmp_path / "run").exists()
