import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.expert_load import ExpertLoad
from moe.router_metrics import ROUTER_METRICS
from training import metrics
from training.expert_load_log import load_heat_map
from training.metrics import EVALUATION_KEYS, RunLog, json_line, mfu, peak_flops, step_keys


def run_log(run_dir: Path, *, restored_step: int = 0, warn: Callable[[str], None] = pytest.fail) -> RunLog:
    return RunLog(run_dir, restored_step=restored_step, warn=warn)


def step_row(step: int, **changed: Any) -> dict[str, Any]:
    """Keys in an order of their own: the file's order must not come from the caller."""
    row: dict[str, Any] = dict.fromkeys(reversed(step_keys()), 0.5)
    return row | {"step": step, "loss": 1 / 3, "mfu": None} | changed


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """The rows by a parser that refuses NaN and Infinity, which Python's accepts unless told otherwise."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def expert_load() -> ExpertLoad:
    """Two layers, four experts, drawn by hand: layer 1 balanced, layer 3 with a dead expert."""
    load_LE = np.array([[10, 10, 10, 10], [20, 0, 10, 10]])
    return ExpertLoad(
        [1, 3],
        load_LE,
        {
            "dropped_fraction": np.array([0.0, 0.5]),
            "unserved_fraction": np.array([0.0, 0.25]),
            "router_entropy": np.array([1.0, 0.5]),
            "router_logit_rms": np.array([0.5, 2.0]),
            "aux_loss": np.array([1.0, 2.0]),
            "z_loss": np.array([0.5, 0.7]),
        },
    )


def test_rows_are_on_disk_in_order_and_unrounded_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.step(step_row(1, loss=2.0000000000000004))
    log.evaluation({"val_bits_per_byte": None, "val_loss": 3.25, "step": 1})
    log.step(step_row(2, skipped=1))
    rows = strict_lines(tmp_path / "metrics.jsonl")  # before close: a killed process has no time for it
    log.close()
    assert [list(row) for row in rows] == [list(step_keys()), list(EVALUATION_KEYS), [*step_keys(), "skipped"]]
    assert rows[0]["loss"] == 2.0000000000000004 and rows[0]["mfu"] is None
    assert rows[1] == {"step": 1, "val_loss": 3.25, "val_bits_per_byte": None}


@pytest.mark.parametrize("again", [3.25, 3.5])
def test_a_step_has_one_evaluation(tmp_path: Path, again: float) -> None:
    """A finished run that is started again evaluates once more."""
    for finished, val_loss in enumerate((3.25, again)):
        log = run_log(tmp_path, restored_step=2)
        if not finished:
            log.step(step_row(1))
            log.evaluation({"step": 1, "val_loss": 4.0, "val_bits_per_byte": None})
            log.step(step_row(2))
        log.evaluation({"step": 2, "val_loss": val_loss, "val_bits_per_byte": None})
        log.close()
    rows = strict_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == [4.0, again]


def test_numbers_that_json_does_not_know_are_named() -> None:
    line = json_line({"step": 3, "loss": math.nan, "lr": 0.1, "grad_norm": np.float32("inf"), "tokens": np.int64(7)})
    assert line == (
        '{"step": 3, "loss": null, "lr": 0.1, "grad_norm": null, "tokens": 7, "non_finite": ["loss", "grad_norm"]}\n'
    )


def test_a_forgotten_or_invented_key_is_a_bug(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    forgotten = step_row(1)
    del forgotten["lr"]
    for bad in (forgotten, step_row(1, momentum=0.9)):
        with pytest.raises(AssertionError):
            log.step(bad)
    log.close()


def test_opening_trims_steps_that_will_be_taken_again_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "loss": 3.0}\n{"step": 2, "val_loss": 2.5}\n'
    # Killed twice: once in the middle of a line that an older version did not repair, once at the end.
    path.write_bytes(
        kept[:25] + b'{"step": 2, "lo\n' + kept[25:] + b'{"step": 3, "loss": 2.0}\n{"step": 2, "loss": 1.\0\0'
    )
    log = run_log(tmp_path, restored_step=2)
    assert path.read_bytes() == kept
    log.step(step_row(3))
    log.close()
    assert [row["step"] for row in strict_lines(path)] == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["expert_load.jsonl", "metrics.jsonl", "tensorboard"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    metrics.trim_rows(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_trim_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.trim_rows(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_tensorboard_after_a_continuation(tmp_path: Path) -> None:
    for restored, steps in ((0, range(1, 16)), (12, range(13, 16))):
        log = run_log(tmp_path, restored_step=restored)
        for step in steps:
            log.step(step_row(step, loss=step + restored), expert_load())
        log.evaluation({"step": 15, "val_loss": 3.0 + restored, "val_bits_per_byte": None})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    losses = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert losses == [*((step, step) for step in range(1, 13)), (13, 25), (14, 26), (15, 27)]
    assert [(e.step, e.value) for e in board.Scalars("eval/loss")] == [(15, 15.0)]
    assert [e.value for e in board.Scalars("moe/layer_03/load_max_over_mean")] == [2.0] * 15
    assert [e.value for e in board.Scalars("moe/layer_03/dropped_fraction")] == [0.5] * 15
    assert [e.value for e in board.Scalars("moe/layer_01/entropy")] == [1.0] * 15
    assert [[e.value for e in board.Scalars(f"expert_load/layer_03/expert_{e}")] for e in range(4)] == [
        [2.0] * 15,
        [0.0] * 15,
        [1.0] * 15,
        [1.0] * 15,
    ]
    assert not {"train/mfu", "train/step", "eval/bits_per_byte"} & set(board.Tags()["scalars"])
    images = board.Images("moe/expert_load")
    assert [image.step for image in images] == [1, 11, 13, 15]  # every tenth of a process, and its last
    decoded = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
    assert np.array_equal(decoded, load_heat_map(expert_load(), 1))


def test_every_expert_of_every_layer_has_its_rows(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    for step in (1, 2, 3):
        log.step(step_row(step), expert_load())
    log.close()
    log = run_log(tmp_path, restored_step=1)  # steps 2 and 3 are taken again
    log.step(step_row(2), expert_load())
    log.close()
    of_layer_1 = {"layer": 1, "assignments": [10, 10, 10, 10], "dropped_fraction": 0.0}
    of_layer_3 = {"layer": 3, "assignments": [20, 0, 10, 10], "dropped_fraction": 0.5}
    assert strict_lines(tmp_path / "expert_load.jsonl") == [
        {"step": step, **row} for step in (1, 2) for row in (of_layer_1, of_layer_3)
    ]


def test_many_experts_are_recorded_less_often(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    many = ExpertLoad(
        [0, 1], np.ones((2, 1536), int), {name: np.zeros(2) for name in ROUTER_METRICS}
    )  # three times what a step may cost
    for step in range(10, 80, 10):
        log.step(step_row(step), many)
    log.close()
    rows = strict_lines(tmp_path / "expert_load.jsonl")
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in (10, 40, 70) for layer in (0, 1)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("expert_load/layer_01/expert_0007")] == [10, 40, 70]
    assert len(board.Scalars("moe/layer_01/load_cv")) == 7


def test_without_tensorboard_the_figures_are_kept(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    warnings: list[str] = []
    log = run_log(tmp_path, warn=warnings.append)
    for step in (1, 2):
        log.step(step_row(step), expert_load())
    log.evaluation({"step": 2, "val_loss": 3.0, "val_bits_per_byte": None})
    log.close()
    assert [row["step"] for row in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 2]
    assert len(warnings) == 1 and "TensorBoard" in warnings[0]


def test_tensorboard_on_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    log = run_log(tmp_path, warn=warnings.append)
    log.step(step_row(1), expert_load())
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 (the end of the test closes it)
    monkeypatch.setattr(log._loggers._open["tensorboard"]._records, "_writer", full)
    for step in (2, 3):
        log.step(step_row(step), expert_load())
    log.close()
    assert [row["step"] for row in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(warnings) == 1 and "No space left" in warnings[0]


@pytest.mark.parametrize("name", ["metrics.jsonl", "expert_load.jsonl"])
def test_rows_that_cannot_be_written_name_their_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    log = run_log(tmp_path)
    with pytest.raises(OSError, match="No space left") as raised:
        log.step(step_row(1), expert_load())
    assert raised.value.filename == str(tmp_path / name)
    log.close()


def test_expert_load_summed_up() -> None:
    assert expert_load().as_row() == {
        "aux_loss": 1.5,
        "z_loss": 0.6,
        "dropped_fraction": 0.25,
        "unserved_fraction": 0.125,
        "load_max_over_mean": 2.0,
        "load_cv": 0.5**0.5,
        "router_entropy": 0.75,
        "router_logit_rms": 2.0,
        "dead_experts": 1,
    }
    idle = ExpertLoad([0], np.zeros((1, 2)), {})
    assert idle.share_LE.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA H200", "bf16", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("A100-SXM4-40GB", "bf16", 312e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),  # a slice of a device has a slice of the peak
        ("NVIDIA GH200 480GB", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_peak_flops(name: str, dtype: str, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected


def test_mfu() -> None:
    # 6 N FLOP per token of a model of 1e9 parameters, 4 devices of 312 TFLOP/s that see 104,000 tokens a second: half.
    assert mfu(6e9, 104_000, 312e12, 4) == pytest.approx(0.5)
    assert mfu(6e9, 104_000, None, 4) is None
