"""Draws the training losses of runs over steps, tokens, seconds and FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.compare import Summary
from training.planner.report import figure_and_save
from training.run_files import METRICS, json_lines

AXES = ("steps", "tokens", "seconds of training steps", "FLOPs")


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to window - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    last = np.arange(1, len(values) + 1)
    return (sums[last] - sums[first]) / (last - first)


def curves(run: Summary) -> dict[str, np.ndarray]:
    """Of the logged steps of a run: the loss, and what it is drawn over; only what is known of the run."""
    rows = [row for row in json_lines(run.path / METRICS) if "loss" in row]
    found = {"loss": [row["loss"] for row in rows], AXES[0]: [row["step"] for row in rows]}
    if all("tokens" in row for row in rows):
        found[AXES[1]] = [row["tokens"] for row in rows]
        if run.flops_per_token:
            found[AXES[3]] = [row["tokens"] * run.flops_per_token for row in rows]
    if all("step_seconds" in row for row in rows):
        steps = np.diff([0, *found[AXES[0]]])  # of which only every n-th may be logged
        found[AXES[2]] = list(np.cumsum(steps * [row["step_seconds"] for row in rows]))
    return {name: np.array(values, dtype=float) for name, values in found.items()}


def draw(runs: Sequence[Summary], path: Path, window: int) -> None:
    """A panel for each axis, a line for each run.

    Args:
        window: logged steps that a point is the mean of.

    Raises:
        ValueError: no run has logged a step, matplotlib is not installed or does not write this format.
    """
    lines = {run.path.name: curves(run) for run in runs}
    lines = {name: line for name, line in lines.items() if len(line["loss"])}
    if not lines:
        raise ValueError(f"plot={path}: none of the runs has logged a step yet")

    def panels(figure: Any) -> None:
        for axes, over in zip(figure.subplots(2, 2, sharey=True).flat, AXES, strict=True):
            for name, line in lines.items():
                if over in line:
                    axes.plot(line[over], smoothed(line["loss"], window), label=name)
            axes.set_xlabel(over)
            if over == AXES[3]:
                axes.set_xscale("log")
        figure.supylabel("training loss, nats per token" + (f", mean of {window} logged steps" if window > 1 else ""))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")

    figure_and_save(panels, path, (9.0, 6.5))
