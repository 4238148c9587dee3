"""Runs side by side: how far they came, how well, how fast, and which settings make the difference. Imports nothing
heavy."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from training.compatibility import flatten
from training.run_dir import read_settings

if TYPE_CHECKING:
    from rich.table import Table

# Where a run is kept and on how many steps it was told to stop say nothing of what it is.
_NOT_COMPARED = ("run.", "train.stop_after", "slurm.", "runtime.", "cluster.")


@dataclass(frozen=True)
class Summary:
    """A run in one line. None where the run has not come that far."""

    path: Path
    settings: dict[str, Any]
    steps: str
    """Taken and wanted: 20/200."""
    loss: float | None
    """Of the last logged step, nats per token."""
    val_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    """The median of its steps."""
    dropped: float | None
    """A fraction, of the last logged step."""


def summarise(path: Path) -> Summary:
    """Raises ValueError: the directory is not a run's."""
    settings = flatten(read_settings(path))
    steps: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    for row in _rows(path / "metrics.jsonl"):
        if "loss" in row:
            steps.append(row)
        elif "val_loss" in row:
            evaluation = row
    last = steps[-1] if steps else {}
    rates = [row["tokens_per_second"] for row in steps if row["tokens_per_second"]]
    return Summary(
        path,
        settings,
        f"{last.get('step', 0)}/{settings.get('train.steps', '?')}",
        last.get("loss"),
        evaluation.get("val_loss"),
        evaluation.get("val_bits_per_byte"),
        median(rates) if rates else None,
        last.get("dropped_fraction"),
    )


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:  # a run that has not taken a step
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # being written, or torn by a kill
            continue
        if isinstance(row, dict):
            yield row


def differing(runs: Sequence[Summary]) -> list[str]:
    """The settings that are not the same in all runs."""
    keys = {key: None for run in runs for key in run.settings if not key.startswith(_NOT_COMPARED)}
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def comparison(runs: Sequence[Summary]) -> "Table":
    """A table with a row per run and a column per setting in which they differ."""
    from rich.table import Table

    settings = differing(runs)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", overflow="fold")
    for key in settings:
        table.add_column(key, overflow="fold")
    for figure in ("steps", "loss", "held-out", "bits/byte", "tokens/s", "dropped"):
        table.add_column(figure, justify="right", no_wrap=True)
    for run in runs:
        figures = (
            (run.loss, ".4f"),
            (run.val_loss, ".4f"),
            (run.bits_per_byte, ".3f"),
            (run.tokens_per_second, ",.0f"),
            (run.dropped, ".1%"),
        )
        shown = ["-" if value is None else format(value, form) for value, form in figures]
        table.add_row(str(run.path), *(_setting(run.settings.get(key)) for key in settings), run.steps, *shown)
    return table


def _setting(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
