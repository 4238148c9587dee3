"""The figures of a study, from the runs of a folder that are finished."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sparse_vs_dense.runs import DENSE, Job, Model, Study, rows_of, sparse
from benchmarks.sparse_vs_dense.speedup import (
    Curve,
    held_out_curve,
    interval,
    lowest_both_reach,
    speedups,
    training_curve,
    trend,
)
from training.flops import Cost

POINTS = 200
"""Of a curve in the JSON."""


@dataclass(frozen=True)
class Found:
    """The finished runs of a model at a batch size, by seed."""

    model: Model
    training: dict[int, Curve]
    held_out: dict[int, Curve]
    step_seconds: float
    """Median."""


def load(
    study: Study, model: Model, batch: int, seeds: int, folder: Path, window: int, flops_per_token: float
) -> Found | None:
    """None: no run is finished."""
    training, held_out, seconds = {}, {}, []
    for seed in range(1, seeds + 1):
        rows = rows_of(folder / "runs" / Job(model, batch, seed).name, study.steps)
        if rows is not None:
            training[seed] = training_curve(rows, flops_per_token, window)
            held_out[seed] = held_out_curve(rows, flops_per_token)
            seconds += [row["step_seconds"] for row in rows if "loss" in row]
    return Found(model, training, held_out, statistics.median(seconds)) if training else None


def _pairs(base: dict[int, Curve], other: dict[int, Curve]) -> tuple[list[Curve], list[Curve]]:
    """The runs of the seeds that both have."""
    seeds = sorted(base.keys() & other.keys())
    return [base[seed] for seed in seeds], [other[seed] for seed in seeds]


def _mean_curve(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """The mean of the seeds, thinned."""
    length = min(len(curve.loss) for curve in curves)
    chosen = np.unique(np.linspace(0, length - 1, min(POINTS, length)).round().astype(int))
    return {
        name: [float(value) for value in np.mean([getattr(curve, name)[chosen] for curve in curves], axis=0)]
        for name in ("steps", "seconds", "flops", "loss")
    }


def of_model(found: Found, dense: Found) -> dict[str, Any]:
    """Held-out losses at equal steps, differences from the dense twin on the same batches, and speed-ups."""
    last = {seed: float(curve.loss[-1]) for seed, curve in found.held_out.items()}
    result: dict[str, Any] = {
        "seeds": sorted(last),
        "held_out": statistics.fmean(last.values()),
        "held_out_of_seeds": list(last.values()),
        "step_seconds": found.step_seconds,
        "training_curve": _mean_curve(list(found.training.values())),
        "held_out_curve": _mean_curve(list(found.held_out.values())),
    }
    bases, others = _pairs(dense.training, found.training)
    if found.model.name == DENSE or not bases:
        return result
    held_out = _pairs(dense.held_out, found.held_out)
    differences = [float(o.loss[-1] - b.loss[-1]) for b, o in zip(*held_out, strict=True)]
    result["difference"] = statistics.fmean(differences)
    result["difference_interval"] = interval(differences, lambda values: float(values.mean()))
    result["speedup"] = speedups(bases, others)
    result["speedup_by_held_out"] = speedups(*held_out)["final"]
    return result


def against_equal_parameters(found: dict[str, Found]) -> dict[str, Any]:
    """Every sparse model against the dense one of as many parameters, where that was trained: at the lowest loss that
    both reach, the dense model's steps and FLOPs over the sparse one's."""
    result = {}
    for name, mine in found.items():
        other = found.get(f"wide{mine.model.experts}")
        if mine.model.experts is None or other is None:
            continue
        pairs = _pairs(other.training, mine.training)
        if pairs[0]:
            losses = [statistics.fmean(float(c.loss[-1]) for c in of.held_out.values()) for of in (mine, other)]
            ratios = {over: lowest_both_reach(*pairs, over) for over in ("steps", "flops")}
            result[name] = {"dense": other.model.name, "held_out": losses[0], "held_out_of_dense": losses[1]} | ratios
    return result


def analyse(
    study: Study, models: Sequence[Model], batches: Sequence[int], seeds: int, folder: Path, window: int
) -> dict[str, Any]:
    """Everything that the command prints, JSON-serialisable."""
    costs = {model.name: model.cost(study.overrides) for model in models}
    result: dict[str, Any] = {"steps": study.steps, "smoothed_steps": window, "models": _models(models, costs)}
    result["batches"] = {}
    for batch in batches:
        loaded = {
            model.name: load(study, model, batch, seeds, folder, window, costs[model.name].flops_per_token)
            for model in models
        }
        found = {name: of for name, of in loaded.items() if of is not None}
        if DENSE not in found:
            continue
        by_model = {name: of_model(of, found[DENSE]) for name, of in found.items()}
        result["batches"][str(batch)] = {
            "models": by_model,
            "trend": _trend(by_model, found, lambda of: of["speedup"]["final"]["steps"], study),
            "trend_by_held_out": _trend(by_model, found, lambda of: of["speedup_by_held_out"]["steps"], study),
            "against_equal_parameters": against_equal_parameters(found),
        }
    return result


def _models(models: Sequence[Model], costs: dict[str, Cost]) -> dict[str, Any]:
    dense = costs[DENSE].flops_per_token
    return {
        model.name: {
            "experts": model.experts,
            "parameters": costs[model.name].total,
            "active_parameters": costs[model.name].active,
            "flops_per_token": costs[model.name].flops_per_token,
            "flops_over_dense": costs[model.name].flops_per_token / dense,
        }
        for model in models
    }


def _trend(
    by_model: dict[str, Any], found: dict[str, Found], read: Callable[[Any], Any], study: Study
) -> dict[str, Any] | None:
    ratios = {
        of.model.experts: read(by_model[name])["of_seeds"]
        for name, of in found.items()
        if of.model.experts is not None and "speedup" in by_model[name]
    }
    fitted = trend(ratios)
    if fitted is None:
        return None
    experts = fitted["experts_at_target"]
    # Beyond this number the line says nothing that a run could show.
    near = round(experts) if experts is not None and experts < 2**20 else None
    fitted["parameters_at_target"] = sparse(max(near, 2)).cost(study.overrides).total if near else None
    return fitted
