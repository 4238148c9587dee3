"""Steps to equal loss: how many times as many steps a dense model needs to reach a loss as a sparse one, with intervals
over seeds, and how that grows with the number of experts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLED = 2000
FRACTIONS = (0.25, 0.5, 0.75)
"""Of the dense twin's steps, at which its loss is a level."""
TARGET = 4.0
OVER = ("steps", "seconds", "flops")


@dataclass(frozen=True)
class Curve:
    """The losses of a run over its steps, seconds of training and FLOPs."""

    loss: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray

    def reach(self, level: float, over: str = "steps") -> float | None:
        """Where the loss first is at or below a level, on a straight line from the point before; None: nowhere."""
        x = getattr(self, over)
        below = np.flatnonzero(self.loss <= level)
        if not len(below):
            return None
        at = int(below[0])
        if not at:
            return float(x[0])
        share = (self.loss[at - 1] - level) / (self.loss[at - 1] - self.loss[at])
        return float(x[at - 1] + share * (x[at] - x[at - 1]))

    def at(self, step: float) -> float:
        return float(np.interp(step, self.steps, self.loss))


def training_curve(rows: Sequence[dict[str, Any]], flops_per_token: float, window: int) -> Curve:
    """Means of `window` consecutive training losses, each at the mean of its steps: a mean of the last steps would lag
    behind by half a window and draw every ratio of steps to 1."""
    steps = [row for row in rows if "loss" in row]
    columns = {
        "loss": [math.inf if row["loss"] is None else row["loss"] for row in steps],
        "steps": [row["step"] for row in steps],
        "seconds": np.cumsum([row["step_seconds"] for row in steps]),
        "flops": [row["tokens"] * flops_per_token for row in steps],
    }
    window = min(window, len(steps))
    kernel = np.full(window, 1 / window)
    return Curve(**{name: np.convolve(np.asarray(x, dtype=float), kernel, "valid") for name, x in columns.items()})


def held_out_curve(rows: Sequence[dict[str, Any]], flops_per_token: float) -> Curve:
    """The held-out losses, all on the same text."""
    steps = {row["step"]: row for row in rows if "loss" in row}
    seconds = dict(zip(steps, np.cumsum([row["step_seconds"] for row in steps.values()]), strict=True))
    points = [row for row in rows if row.get("val_loss") is not None and row["step"] in steps]
    at = [row["step"] for row in points]
    return Curve(
        np.array([row["val_loss"] for row in points], dtype=float),
        np.array(at, dtype=float),
        np.array([seconds[step] for step in at], dtype=float),
        np.array([steps[step]["tokens"] * flops_per_token for step in at], dtype=float),
    )


def ratio(base: Curve, other: Curve, level: float, over: str = "steps") -> float | None:
    """How many times as much the base needs to reach a loss; None: one of them does not reach it."""
    needed, instead = base.reach(level, over), other.reach(level, over)
    return None if needed is None or not instead else needed / instead


def interval(values: Sequence[float], mean: Callable[[np.ndarray], float]) -> list[float] | None:
    """The 95 % of resampled seeds (bootstrap); None for a single seed."""
    if len(values) < 2:
        return None
    random, found = np.random.default_rng(0), np.asarray(values, dtype=float)
    means = [mean(found[random.integers(len(found), size=len(found))]) for _ in range(RESAMPLED)]
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


def geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def over_seeds(ratios: Sequence[float | None]) -> dict[str, Any]:
    """Geometric mean of the ratios of the seeds, each of a pair of runs on the same batches. null where a run did not
    reach the loss, which is then counted."""
    known = [ratio for ratio in ratios if ratio is not None]
    missing = len(ratios) - len(known)
    whole = bool(known) and not missing
    return {
        "speedup": geometric_mean(np.asarray(known)) if whole else None,
        "interval": interval(known, geometric_mean) if whole else None,
        "of_seeds": list(ratios),
        "not_reached": missing,
    }


def speedups(bases: Sequence[Curve], others: Sequence[Curve]) -> dict[str, Any]:
    """Of pairs of runs, a pair per seed: the speed-up at each of several losses and at the base's last, over steps,
    seconds and FLOPs. The losses are those of the base, in the mean of the seeds, after FRACTIONS of its steps."""
    end = min(base.steps[-1] for base in bases)
    levels = [float(np.mean([base.at(fraction * end) for base in bases])) for fraction in FRACTIONS]

    def at(level_of: Callable[[Curve], float]) -> dict[str, Any]:
        pairs = [(base, other, level_of(base)) for base, other in zip(bases, others, strict=True)]
        return {over: over_seeds([ratio(*pair, over) for pair in pairs]) for over in OVER}

    return {
        "levels": [{"loss": level} | at(lambda _, level=level: level) for level in levels],
        "final": {"loss": float(np.mean([base.loss[-1] for base in bases]))} | at(lambda base: float(base.loss[-1])),
    }


def lowest_both_reach(bases: Sequence[Curve], others: Sequence[Curve], over: str) -> dict[str, Any]:
    """The speed-up at the lowest loss that both runs of a seed reach."""
    pairs = [(b, o, max(float(b.loss.min()), float(o.loss.min()))) for b, o in zip(bases, others, strict=True)]
    return {"loss": float(np.mean([level for *_, level in pairs]))} | over_seeds([ratio(*p, over) for p in pairs])


def trend(by_experts: dict[int, Sequence[float | None]]) -> dict[str, Any] | None:
    """Least squares of speed-up = a + b log2 E over all seeds, with the interval of b from resampled seeds, and the
    number of experts at which the line reaches TARGET. None: fewer than two numbers of experts have a speed-up."""
    known = {experts: list(ratios) for experts, ratios in by_experts.items() if ratios and None not in ratios}
    if len(known) < 2:
        return None
    x = np.log2(np.array(list(known), dtype=float))
    seeds = min(len(ratios) for ratios in known.values())
    y_ES = np.array([ratios[:seeds] for ratios in known.values()], dtype=float)  # experts by seeds

    def line(y: np.ndarray) -> tuple[float, float]:
        dx = x - x.mean()
        slope = float(dx @ (y - y.mean()) / (dx @ dx))
        return slope, float(y.mean() - slope * x.mean())

    def experts_at_target(slope: float, intercept: float) -> float | None:
        power = (TARGET - intercept) / slope if slope > 0 else math.inf
        return 2.0**power if power < 64 else None

    slope, intercept = line(y_ES.mean(1))
    left_out = [experts for experts in by_experts if experts not in known]
    found: dict[str, Any] = {"experts": list(known), "left_out": left_out, "per_doubling": slope, "at_one": intercept}
    found |= {"per_doubling_interval": None, "experts_at_target_interval": None}
    found |= {"target": TARGET, "experts_at_target": experts_at_target(slope, intercept)}
    if seeds > 1:
        random = np.random.default_rng(0)
        lines = [line(y_ES[:, random.integers(seeds, size=seeds)].mean(1)) for _ in range(RESAMPLED)]
        found["per_doubling_interval"] = [float(q) for q in np.quantile([s for s, _ in lines], [0.025, 0.975])]
        reached = [math.inf if (e := experts_at_target(*one)) is None else e for one in lines]
        # Not interpolated: a bound between a number and infinity is infinity.
        bounds = np.quantile(reached, [0.025, 0.975], method="nearest")
        found["experts_at_target_interval"] = [float(q) if math.isfinite(q) else None for q in bounds]
    return found
