"""Writes the metrics of a run: metrics.jsonl, expert_load.jsonl and loggers; and computes `mfu`.

Shapes: L sparse layers."""

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from conf.preference_schema import PREFERENCE_METRICS
from moe.expert_load import ExpertLoad
from moe.router_metrics import ROUTER_METRICS
from training.expert_load_log import (
    has_heat_map,
    layer_name,
    load_charts,
    load_heat_map,
    load_rows,
    load_series,
    recorded_every,
)
from training.loggers import Loggers, RunInfo
from training.run_files import EXPERT_LOAD, METRICS, json_lines, json_object

Row = Mapping[str, Any]
_LOG = logging.getLogger(__name__)

_KEYS_BEFORE_ROUTERS = (
    "step",
    "loss",  # language-model cross-entropy, nats per token
    "lr",
    "grad_norm",  # before clipping
    "tokens",  # since the beginning of the run
    "tokens_per_second",  # over all ranks
    "step_seconds",  # mean since the previous row, including the optimizer and loading data; on a GPU a step late
    "mfu",  # model FLOPs utilisation, a fraction; None where the peak is unknown
    "world_size",
)
_KEYS_AFTER_ROUTERS = (
    "rank_seconds",  # time of the median rank in a step, without waiting for other data-parallel ranks
    "slowest_seconds",  # the slowest rank's
    "slowest_rank",
    "data_wait",  # seconds of a step in which a rank waited for its batches; the rank that waited longest
    "memory_bytes",  # the largest peak of any rank, before the update of the step
)
OPTIONAL_STEP_KEYS = (
    "mtp_loss",  # of multi-token prediction, nats per token: mean over its layers, since the previous row
    "skipped",  # updates skipped since the previous row; absent if there are none
    *PREFERENCE_METRICS,  # means over the step's prompts; with train.objective=dpo or reward
)
EVALUATION_KEYS = ("step", "val_loss", "val_bits_per_byte")
OPTIONAL_EVALUATION_KEYS = tuple(f"val_{name}" for name in PREFERENCE_METRICS)
PART_LOSS = "val_loss/"
"""Prefix of the keys with the held-out loss of each part of data=blend; with eval.by_part."""
SHARE = "share/"
"""Prefix of the keys with the share of each part of data=blend in the samples since the previous row."""
TASKS = "eval_tasks/"
"""Prefix of the keys of evaluation tasks, which have lines of their own."""

# Peak FLOP/s in bf16 from the data sheets, which assume 2:4 sparsity; a dense product reaches half. The names are the
# complete ones that CUDA reports, so that MIG slices and variants (GH200, H100 for other markets) are unknown rather
# than wrong. Data sheets: "NVIDIA A100 Tensor Core GPU", "NVIDIA H100 Tensor Core GPU" (its first
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


def step_keys() -> tuple[str, ...]:
    """Keys of a logged step in metrics.jsonl, in their order."""
    return (*_KEYS_BEFORE_ROUTERS, *ROUTER_METRICS, *_KEYS_AFTER_ROUTERS)


def check_router_metrics() -> None:
    """Raises ValueError where a router metric has the name of another key of metrics.jsonl."""
    other = {*_KEYS_BEFORE_ROUTERS, *_KEYS_AFTER_ROUTERS, *OPTIONAL_STEP_KEYS, *EVALUATION_KEYS}
    other |= {*OPTIONAL_EVALUATION_KEYS}
    for name in ROUTER_METRICS:
        if name in other:
            raise ValueError(f"router metric {name}: metrics.jsonl has another key {name}; give this one another name")


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
    """Writes metrics.jsonl and expert_load.jsonl of a run directory, and calls its loggers. Only rank 0 has one.

    The constructor removes rows past `restored_step` (0: all rows), since those steps are run again. A logger that
    fails is reported once with `warn` and not used any more; metrics.jsonl has the same values.

    Raises:
        OSError: by the constructor, `step` and `evaluation`: one of the .jsonl files cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        restored_step: int = 0,
        warn: Callable[[str], None],
        loggers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = run_dir / METRICS
        self._rows, self._loads = (_open_rows(run_dir / name, restored_step) for name in (METRICS, EXPERT_LOAD))
        self._logged = 0
        self._last_load: tuple[int, ExpertLoad] | None = None  # step and load that no heat map shows yet
        self._loggers = Loggers(loggers, RunInfo(run_dir, restored_step, settings or {}), warn)

    def step(self, row: Row, load: ExpertLoad | None = None, mtp_losses: Sequence[float] = ()) -> None:
        """Writes a logged step: all of step_keys(), some of OPTIONAL_STEP_KEYS, and shares; `load` is None for a dense
        model. Loggers also get the losses of single layers for multi-token prediction."""
        shares = [key for key in row if key.startswith(SHARE)]
        keys = (*step_keys(), *OPTIONAL_STEP_KEYS, *shares)
        assert {*step_keys()} <= row.keys() <= {*keys}, sorted(row)
        step, logged = row["step"], self._logged
        self._logged += 1
        every_expert = load is not None and logged % recorded_every(load) == 0
        single = {f"mtp_loss_{number}": loss for number, loss in enumerate(mtp_losses, 1) if len(mtp_losses) > 1}
        self._show(step, {**row, **single}, load, every_expert=every_expert, first=logged == 0)
        if load is not None and has_heat_map(logged):
            self._draw(step, load)
        self._last_load = (step, load) if load is not None and not has_heat_map(logged) else None
        self._write(self._rows, {key: row[key] for key in keys if key in row})
        if load is not None and every_expert:
            self._write(self._loads, *load_rows(step, load))

    def evaluation(self, row: Row) -> None:
        """Writes an evaluation: all of EVALUATION_KEYS, some of OPTIONAL_EVALUATION_KEYS, losses of parts. A step has
        one: where a finished run is started again, the new one takes the place of the one before."""
        parts = [key for key in row if key.startswith(PART_LOSS)]
        keys = (*EVALUATION_KEYS, *OPTIONAL_EVALUATION_KEYS, *parts)
        assert set(EVALUATION_KEYS) <= row.keys() <= set(keys), sorted(row)
        kept = {key: row[key] for key in keys if key in row}
        earlier = [] if self._logged else json_lines(self._path)
        if before := [one for one in earlier if one.get("step") == row["step"] and "val_loss" in one]:
            if before == [json_object(json_line(kept))]:
                return
            self._rows.close()
            rewrite_rows(self._path, lambda line: json_object(line) not in before)
            self._rows = self._path.open("a", encoding="utf-8")
        values = {f"eval/{key.removeprefix('val_')}": row[key] for key in keys[1:] if row.get(key) is not None}
        self._loggers.each(lambda logger: logger.scalars(row["step"], values))
        self._write(self._rows, kept)

    def tasks(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the results of evaluation tasks: {"TASK/METRIC": value}. Standard errors go to metrics.jsonl only."""
        shown = {f"{TASKS}{name}": value for name, value in values.items() if "_stderr" not in name}
        self._loggers.each(lambda logger: logger.scalars(step, shown))
        self._write(self._rows, {"step": step, **{f"{TASKS}{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Draws the last step's load, if it is not drawn yet, and closes the files."""
        if self._last_load:
            self._draw(*self._last_load)
        self._loggers.each(lambda logger: logger.close())
        for file in (self._rows, self._loads):
            with contextlib.suppress(OSError):  # of a row that could not be written before
                file.close()

    def _write(self, file: TextIO, *rows: dict[str, Any]) -> None:
        try:
            file.write("".join(map(json_line, rows)))
            file.flush()
        except OSError as error:
            error.filename = file.name
            raise

    def _draw(self, step: int, load: ExpertLoad) -> None:
        picture = functools.cache(lambda: load_heat_map(load, step))
        self._loggers.each(lambda logger: logger.image(step, "moe/expert_load", picture()))

    def _show(self, step: int, row: Row, load: ExpertLoad | None, *, every_expert: bool, first: bool) -> None:
        values = {f"train/{key}": value for key, value in row.items() if key != "step" and value is not None}
        if load is not None:
            for metric in ROUTER_METRICS.values():
                if metric.layer_series is not None:
                    for layer, value in zip(load.layer_ids, load.metric(metric.name).tolist(), strict=True):
                        values[f"moe/{layer_name(layer)}/{metric.layer_series}"] = value
            if every_expert:
                values |= load_series(load)
            if first:
                charts = load_charts(load)
                self._loggers.each(lambda logger: logger.layout(charts))
        self._loggers.each(lambda logger: logger.scalars(step, values))


def _open_rows(path: Path, restored_step: int) -> TextIO:
    if path.is_file():
        trim_rows(path, restored_step)
    return path.open("a", encoding="utf-8")


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of strict JSON with a newline. JSON has no NaN or infinity: such values become null, and their
    keys are listed under "non_finite"."""
    # numpy scalars and tensors of one element have .item()
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    non_finite = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    if non_finite:
        plain |= dict.fromkeys(non_finite) | {"non_finite": non_finite}
    return json.dumps(plain, allow_nan=False) + "\n"


def trim_rows(path: Path, last_step: int) -> None:
    """Removes the rows of a .jsonl file past `last_step`, and truncated lines that a killed process has left."""
    torn = 0

    def keep(line: bytes) -> bool:
        nonlocal torn
        row = json_object(line)
        if row is None or type(row.get("step")) is not int:
            torn += 1
            return False
        return row["step"] <= last_step

    rewrite_rows(path, keep)
    if torn:
        _LOG.warning("%s: dropped %d torn line(s)", path, torn)


def rewrite_rows(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Removes lines from a file, atomically."""
    aside = path.with_name(path.name + ".tmp")
    with path.open("rb") as rows, aside.open("wb") as kept:
        # A truncated line may lack only its newline.
        kept.writelines(line.rstrip(b"\n") + b"\n" for line in rows if keep(line))
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(aside, path)
