"""Compares runs: steps, losses, speed, size, and the settings in which they differ. Does not import torch."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from conf.printable import one_line
from training.adapters import run_cost
from training.compatibility import flatten
from training.flops import Cost
from training.run_dir import load_config, read_settings
from training.run_files import METRICS, json_lines

# Settings that do not affect what a run computes.
_NOT_COMPARED = ("run.", "train.stop_after", "slurm.", "runtime.", "cluster.")
_WIDEST_SETTING = 30  # characters


@dataclass(frozen=True)
class Summary:
    """The figures of a run. None: not available yet."""

    path: Path
    settings: dict[str, Any]
    steps: str
    """Steps done and configured: 20/200."""
    loss: float | None
    """Of the last logged step, in nats per token."""
    val_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    """Median over the logged steps."""
    dropped: float | None
    """Dropped fraction of the last logged step."""
    parameters: int | None
    active_parameters: int | None
    """Parameters that a token uses on average."""
    flops_per_token: float | None
    """Forward and backward."""
    flops: float | None
    """Total over all tokens so far."""


def summarise(path: Path) -> Summary:
    """Raises ValueError: not a run directory."""
    settings = flatten(read_settings(path))
    steps: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    for row in json_lines(path / METRICS):
        if "loss" in row:
            steps.append(row)
        elif "val_loss" in row:
            evaluation = row
    last = steps[-1] if steps else {}
    cost = _cost(path)
    rates = [rate for row in steps if (rate := row.get("tokens_per_second"))]
    return Summary(
        path,
        settings,
        f"{last.get('step', 0)}/{settings.get('train.steps', '?')}",
        last.get("loss"),
        evaluation.get("val_loss"),
        evaluation.get("val_bits_per_byte"),
        median(rates) if rates else None,
        last.get("dropped_fraction"),
        cost.total if cost else None,
        cost.active if cost else None,
        cost.flops_per_token if cost else None,
        cost.flops_per_token * last["tokens"] if cost and last.get("tokens") else None,
    )


def _cost(path: Path) -> Cost | None:
    """None: the settings were written by another version."""
    try:
        config = load_config(path)
    except ValueError:
        return None
    return run_cost(config)


def differing(runs: Sequence[Summary]) -> list[str]:
    """The settings in which the runs differ."""
    keys = {key: None for run in runs for key in run.settings if not key.startswith(_NOT_COMPARED)}
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def as_json(runs: Sequence[Summary]) -> str:
    """A JSON list with an object per run. `settings` are those in which the runs differ. Figures are null if not
    available yet, or if the settings were written by another version."""
    keys = differing(runs)
    shown = []
    for run in runs:
        figures = asdict(run) | {"path": str(run.path), "settings": {key: run.settings.get(key) for key in keys}}
        shown.append(figures)
    return json.dumps(shown, indent=1, default=str)


def comparison(runs: Sequence[Summary], width: int | None = None) -> str:
    """A table with a row per run and a column per setting in which they differ and per figure.

    width: columns of the terminal. A wider table is split into several blocks, and the runs are numbered. None: no
    limit.
    """
    names = _shortest({run.path.parts: run.path.name or str(run.path) for run in runs}, os.sep)
    names = {parts: one_line(name) for parts, name in names.items()}
    keys = differing(runs)
    titles = _shortest({tuple(key.split(".")): key.split(".")[-1] for key in keys}, ".")
    first = [("run", [names[run.path.parts] for run in runs], False)]
    columns = [
        (titles[tuple(key.split("."))], [_setting(run.settings.get(key)) for run in runs], False) for key in keys
    ]
    columns += [
        (title, ["-" if (value := read(run)) is None else form(value) for run in runs], True)
        for title, read, form in _FIGURES
    ]
    if width is None or sum(map(_width_of, [*first, *columns])) + 2 * len(columns) <= width:
        return _block([*first, *columns], width)
    numbers = ("#", [str(number) for number in range(1, len(runs) + 1)], True)
    block, blocks = [numbers, *first], []
    for column in columns:
        if len(block) > 1 and sum(map(_width_of, [*block, column])) + 2 * len(block) > width:
            blocks.append(block)
            block = [numbers]
        block.append(column)
    return "\n\n".join(_block(block, width) for block in [*blocks, block])


Column = tuple[str, list[str], bool]
"""Title, a cell per run, whether it is right-aligned."""


def _width_of(column: Column) -> int:
    return max(len(column[0]), *map(len, column[1]))


def _block(columns: Sequence[Column], width: int | None) -> str:
    """The columns side by side. Cells of a column that is wider than the terminal are shortened in the middle."""
    widest = width - 2 - 2 * (len(columns) - 1) if width else 10**6
    lines = []
    for row in zip(*([title, *cells] for title, cells, _ in columns), strict=True):
        cells = []
        for cell, column in zip(row, columns, strict=True):
            size = min(_width_of(column), widest)
            short = _shortened(cell, size)
            cells.append(short.rjust(size) if column[2] else short.ljust(size))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _shortest(names: Mapping[tuple[str, ...], str], separator: str) -> dict[tuple[str, ...], str]:
    """For each path, the shortest suffix that is unique among the paths."""
    short = {}
    for parts, last in names.items():
        length = next(
            n
            for n in range(1, len(parts) + 1)
            if n == len(parts) or sum(other[-n:] == parts[-n:] for other in names) == 1
        )
        short[parts] = last if length == 1 else separator.join(parts[-length:]).replace(separator * 2, separator)
    return short


def _count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


_FIGURES: tuple[tuple[str, Callable[[Summary], Any], Callable[[Any], str]], ...] = (
    ("steps", lambda run: run.steps, str),
    ("loss", lambda run: run.loss, "{:.4f}".format),
    ("held-out", lambda run: run.val_loss, "{:.4f}".format),
    ("bits/byte", lambda run: run.bits_per_byte, "{:.3f}".format),
    ("tokens/s", lambda run: run.tokens_per_second, "{:,.0f}".format),
    ("dropped", lambda run: run.dropped, "{:.1%}".format),
    ("params", lambda run: run.parameters, _count),
    ("active", lambda run: run.active_parameters, _count),
    ("FLOPs/token", lambda run: run.flops_per_token, _count),
    ("FLOPs", lambda run: run.flops, "{:.2e}".format),
)


def _setting(value: Any) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return _shortened(one_line(shown), _WIDEST_SETTING)


def _shortened(text: str, size: int) -> str:
    """At most `size` characters; a longer text is shortened in the middle."""
    return text if len(text) <= size else f"{text[: (size - 1) // 2]}…{text[len(text) - size // 2 :]}"
