"""Fits power laws of the held-out loss over compute, parameters and tokens of finished runs.

A law L = (x_c / x)^alpha (Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1 to 1.3) is a straight line in logarithms. Its
confidence interval is the 95 % of resampled sets of runs (bootstrap)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.compare import Summary
from training.planner.report import figure_and_save

RESAMPLED = 1000
FEWEST = 3
"""Runs that differ in a quantity, for a law over it."""


@dataclass(frozen=True)
class PowerLaw:
    """L = (x_c / x)^alpha."""

    what: str
    alpha: float
    low: float
    high: float
    """Bounds of the 95 % interval of alpha."""
    x_c: float
    """Where the fitted loss is 1 nat."""
    runs: int

    def loss(self, x: float) -> float:
        return (self.x_c / x) ** self.alpha


@dataclass(frozen=True)
class Point:
    """A finished run."""

    name: str
    loss: float
    """Held-out, in nats per token."""
    compute: float
    """FLOPs of the training."""
    parameters: float
    """Active ones."""
    tokens: float


def points(runs: Sequence[Summary]) -> tuple[list[Point], list[str]]:
    """(the runs that can be used, a note for each other one)."""
    found, notes = [], []
    for run in runs:
        if run.val_loss is None:
            notes.append(f"{run.path} is left out: it has no held-out loss yet")
        elif run.flops is None or run.flops_per_token is None or run.active_parameters is None:
            notes.append(f"{run.path} is left out: its settings were written by another version")
        else:
            tokens = run.flops / run.flops_per_token
            found.append(Point(run.path.name, run.val_loss, run.flops, run.active_parameters, tokens))
    return found, notes


def fit(found: Sequence[Point], what: str) -> PowerLaw | None:
    """The law over `what` (compute, parameters or tokens); None: fewer than three different values."""
    x = np.array([math.log(getattr(point, what)) for point in found])
    y = np.array([math.log(point.loss) for point in found])
    if len(set(x.round(6).tolist())) < FEWEST:
        return None
    slope, intercept = _line(x, y)
    random = np.random.default_rng(0)
    slopes = []
    while len(slopes) < RESAMPLED:
        chosen = random.integers(len(x), size=len(x))
        if len(set(x[chosen].round(6).tolist())) >= 2:
            slopes.append(-_line(x[chosen], y[chosen])[0])
    low, high = np.quantile(slopes, [0.025, 0.975])
    x_c = math.exp(-intercept / slope) if slope else math.inf
    return PowerLaw(what, -slope, float(low), float(high), x_c, len(x))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) by least squares."""
    dx = x - x.mean()
    slope = float(dx @ (y - y.mean()) / (dx @ dx))
    return slope, float(y.mean() - slope * x.mean())


def draw(found: Sequence[Point], laws: Sequence[PowerLaw], path: Path) -> None:
    """The runs and the fitted lines, a panel for each law.

    Raises:
        ValueError: matplotlib is not installed, or does not write this format.
    """

    def panels(figure: Any) -> None:
        for axes, law in zip(figure.subplots(1, len(laws), squeeze=False)[0], laws, strict=True):
            x = np.array([getattr(point, law.what) for point in found])
            axes.loglog(x, [point.loss for point in found], "o")
            line = np.geomspace(x.min(), x.max(), 50)
            axes.loglog(line, [law.loss(value) for value in line])
            axes.set_xlabel({"compute": "compute, FLOPs", "parameters": "active parameters"}.get(law.what, law.what))
            axes.set_ylabel("held-out loss, nats per token")
            axes.set_title(f"alpha {law.alpha:.3f} [{law.low:.3f}, {law.high:.3f}]")

    figure_and_save(panels, path, (4.5 * len(laws), 4.0))
