"""What is kept of a run: metrics.jsonl, TensorBoard, and the figures behind `mfu` and the expert load.

Shapes: L sparse layers, E experts."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe.load import ExpertLoad

Row = Mapping[str, Any]

STEP_KEYS = (
    "step",
    "loss",  # language-model cross-entropy, nats per token
    "lr",
    "grad_norm",  # before clipping
    "tokens",  # since the beginning of the run
    "tokens_per_second",  # over all ranks
    "step_seconds",  # mean since the line before, optimizer and wait for data included
    "mfu",  # model FLOPs utilisation, a fraction; None where the peak is unknown
    "world_size",
    "aux_loss",  # mean over layers, without its coefficient
    "z_loss",  # mean over layers, without its coefficient
    "dropped_fraction",  # of the choices, mean over layers
    "unserved_fraction",  # of the tokens: no expert computed them; mean over layers
    "load_max_over_mean",  # the worst layer's
    "load_cv",  # coefficient of variation, the worst layer's
    "router_entropy",  # nats, mean over layers
    "router_logit_rms",  # the worst layer's
    "dead_experts",  # the worst layer's
    "rank_seconds",  # a rank's own time in a step, without the wait for other data-parallel ranks: the median rank's
    "slowest_seconds",  # the slowest rank's
    "slowest_rank",
    "data_seconds",  # waited for data in a step: the rank that waited longest
    "memory_bytes",  # the largest peak of any rank
)
OPTIONAL_STEP_KEYS = ("skipped",)  # updates skipped since the line before; absent when there are none
EVALUATION_KEYS = ("step", "val_loss", "val_bits_per_byte")

# FLOP/s in bf16 as the data sheets print them, which is with 2:4 sparsity; a dense product reaches half. The names are
# those that CUDA reports, whole, so that a MIG slice or a relative of the same name (GH200, H100 for other markets) is
# unknown rather than wrong. Data sheets: "NVIDIA A100 Tensor Core GPU", "NVIDIA H100 Tensor Core GPU" (its first
# edition for PCIe, later ones for NVL), "NVIDIA H200 Tensor Core GPU", "NVIDIA HGX B200".
_SPARSE_BF16_FLOPS = {
    "A100-SXM4-40GB": 624e12,
    "A100-SXM4-80GB": 624e12,
    "A100-PCIE-40GB": 624e12,
    "A100 80GB PCIe": 624e12,
    "H100 80GB HBM3": 1979e12,  # SXM
    "H100 PCIe": 1513e12,
    "H100 NVL": 1671e12,
    "H200": 1979e12,
    "H200 NVL": 1671e12,
    "B200": 4500e12,
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s; None where it is unknown: CPUs, other GPUs, and any dtype but "bf16".

    `device_name` is `torch.cuda.get_device_name()`, `dtype` the run's precision. fp32 has no single peak: it depends
    on whether products may run in TF32.
    """
    sparse = _SPARSE_BF16_FLOPS.get(device_name.removeprefix("NVIDIA "))
    return sparse / 2 if sparse is not None and dtype == "bf16" else None


def mfu(flops_per_token: float, tokens_per_second: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B), a fraction; None where the peak is unknown."""
    return None if peak is None else flops_per_token * tokens_per_second / (peak * world_size)


class RunLog:
    """metrics.jsonl and tensorboard/ of a run directory; rank 0 alone owns one.

    Opening one trims what an earlier process wrote past `restored_step` (0: all of it), since those steps are about to
    be taken again. Every `heatmap_every`-th step that is logged adds a picture of the expert load.
    """

    def __init__(self, run_dir: Path, *, restored_step: int = 0, heatmap_every: int = 100) -> None:
        # Here rather than above: it imports torch, and only a run that starts should pay for it.
        from torch.utils.tensorboard import SummaryWriter

        self._path = path = run_dir / "metrics.jsonl"
        if path.exists():
            trim_rows(path, restored_step)
        self._rows = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=restored_step + 1, flush_secs=30)
        self._heatmap_every = heatmap_every
        self._logged = 0

    def step(self, row: Row, load: ExpertLoad | None = None) -> None:
        """Writes a logged step: all of STEP_KEYS, some of OPTIONAL_STEP_KEYS; `load` is None for a dense model."""
        assert set(STEP_KEYS) <= row.keys() <= {*STEP_KEYS, *OPTIONAL_STEP_KEYS}, sorted(row)
        self._write({key: row[key] for key in (*STEP_KEYS, *OPTIONAL_STEP_KEYS) if key in row})
        step = row["step"]
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(f"train/{key}", value, step)
        if load is not None:
            self._write_load(step, load)
        self._logged += 1

    def evaluation(self, row: Row) -> None:
        """Writes an evaluation: all of EVALUATION_KEYS. A step has one: where a finished run is started again, the new
        one takes the place of the one before."""
        assert row.keys() == set(EVALUATION_KEYS), sorted(row)
        line = json_line({key: row[key] for key in EVALUATION_KEYS})
        if not self._logged and (before := self._evaluations(row["step"])):
            if before == [line]:
                return
            self._rows.close()
            rewrite_rows(self._path, lambda line: line.decode() not in before)
            self._rows = self._path.open("a", encoding="utf-8")
        self._write_line(line)
        for key in EVALUATION_KEYS[1:]:
            if row[key] is not None:
                self._board.add_scalar(f"eval/{key.removeprefix('val_')}", row[key], row["step"])

    def close(self) -> None:
        self._rows.close()
        self._board.close()

    def _evaluations(self, step: int) -> list[str]:
        """The lines of a step's evaluations, kept by an earlier process."""
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = ((line, json.loads(line)) for line in lines)
        return [line for line, row in rows if row["step"] == step and "val_loss" in row]

    def _write(self, row: dict[str, Any]) -> None:
        self._write_line(json_line(row))

    def _write_line(self, line: str) -> None:
        self._rows.write(line)
        self._rows.flush()

    def _write_load(self, step: int, load: ExpertLoad) -> None:
        figures = {
            "load_max_over_mean": load.max_over_mean_L,
            "load_cv": load.cv_L,
            "dropped_fraction": load.dropped_L,
            "unserved_fraction": load.unserved_L,
            "dead_experts": (load.load_LE == 0).sum(axis=1),
            "entropy": load.entropy_L,
            "logit_rms": load.logit_rms_L,
        }
        for name, value_L in figures.items():
            for layer, value in zip(load.layer_ids, value_L, strict=True):
                self._board.add_scalar(f"moe/layer_{layer:02d}/{name}", float(value), step)
        if self._logged % self._heatmap_every == 0:
            self._board.add_image("moe/expert_load", load_heatmap(load), step, dataformats="HWC")


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of strict JSON, its newline included. JSON knows no NaN and no infinity: such a value becomes
    null and its key is listed under "non_finite"."""
    # numpy scalars and tensors of one element have .item()
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    non_finite = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    if non_finite:
        plain |= dict.fromkeys(non_finite) | {"non_finite": non_finite}
    return json.dumps(plain, allow_nan=False) + "\n"


def trim_rows(path: Path, last_step: int) -> None:
    """Drops the rows of metrics.jsonl past `last_step` and the lines that a killed process left torn."""
    torn = 0

    def keep(line: bytes) -> bool:
        nonlocal torn
        try:
            return json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError):
            torn += 1
            return False

    rewrite_rows(path, keep)
    if torn:
        logging.getLogger(__name__).warning("%s: dropped %d torn line(s)", path, torn)


def rewrite_rows(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Drops lines. The old file stays whole until the new one replaces it."""
    aside = path.with_name(path.name + ".tmp")
    with path.open("rb") as rows, aside.open("wb") as kept:
        # The newline may be all that a torn line lacks.
        kept.writelines(line.rstrip(b"\n") + b"\n" for line in rows if keep(line))
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(aside, path)


# ColorBrewer's RdBu, read from blue to red: experts with a quarter, half, once, twice and four times the mean load.
_LOG2_RATIO = (-2, -1, 0, 1, 2)
_COLOURS = np.array([[5, 113, 176], [146, 197, 222], [247, 247, 247], [244, 165, 130], [202, 0, 32]])


def load_heatmap(load: ExpertLoad) -> np.ndarray:
    """The expert load as a picture, uint8 [height, width, 3]: a row per layer, a column per expert; white is the mean,
    blue a quarter of it or less, red four times as much or more, black an expert that no token chose."""
    ratio_LE = load.share_LE * load.load_LE.shape[1]
    dead_LE = ratio_LE == 0
    log2_LE = np.log2(np.where(dead_LE, 1.0, ratio_LE))
    picture = np.stack([np.interp(log2_LE, _LOG2_RATIO, channel) for channel in _COLOURS.T], axis=-1)
    picture[dead_LE] = 0
    cell = int(np.clip(512 // load.load_LE.shape[1], 8, 32))  # pixels
    return picture.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
