"""Shows the plans of a search: as a table with what each loses, as JSON, and as a chart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.schema import Config
from training.memory_estimate import Memory
from training.planner.failures import Advice
from training.planner.rates import Rates
from training.planner.search import Plan

DIGITS = 4
"""Significant digits in JSON."""


def as_json(plans: list[Plan], advice: Advice | None = None) -> str:
    """{"plans": [...], "failures": {...}}, best first. memory_gb is the peak of the fullest rank's tensors, in 1e9
    bytes; parts are seconds of a step, by what they are spent on, and add up to step_seconds. bubbles are seconds of a
    step, by schedule. "failures" is absent if the bandwidth of the storage is unknown."""
    shown: dict[str, Any] = {"plans": [_entry(plan) for plan in plans]}
    if advice:
        f = advice.failures
        values = {"mtbf_seconds": f.mtbf, "restart_seconds": f.restart, "checkpoint_seconds": f.checkpoint}
        values |= {"checkpoint_gb": advice.size / 1e9, "interval_seconds": advice.interval, "lost": advice.lost}
        shown["failures"] = {name: _rounded(value) for name, value in values.items()}
        shown["failures"]["checkpoint.every"] = advice.every
    return json.dumps(shown)


def _entry(plan: Plan) -> dict[str, Any]:
    p = plan.prediction
    return {
        "override": plan.override(),
        "memory_gb": _rounded(p.memory.total / 1e9),
        "step_seconds": _rounded(p.seconds),
        "tokens_per_second_per_gpu": _rounded(p.tokens_per_second_per_gpu),
        "tflops_per_gpu": _rounded(p.flops_per_gpu / 1e12),
        "mfu": _rounded(p.mfu),
        "parts": {name: _rounded(seconds) for name, seconds in p.parts.most_common()},
        "bubbles": {name: _rounded(seconds) for name, seconds in p.bubbles.items()},
        "memory_parts": {name: _rounded(size / 1e9) for name, size in memory_parts(p.memory).items()},
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def memory_parts(memory: Memory) -> dict[str, float]:
    """Bytes on the GPU, by part."""
    names = ("weights", "gradients", "optimizer", "activations", "fp8_weights")
    return {name.replace("_", " "): size for name in names if (size := getattr(memory, name))}


def table(plans: list[Plan], limit_gb: float | None) -> str:
    """A row per plan, and for all but the first what makes it slower."""
    rows = [["", "tp", "pp", "vpp", "cp", "ep", "etp", "dp", "micro", "recompute", "GB", "step s", "tokens/s/GPU"]]
    rows[0] += ["TFLOP/s", "MFU", "why it loses" if len(plans) > 1 else ""]
    for number, plan in enumerate(plans, 1):
        p, layout = plan.prediction, plan.prediction.layout
        recompute = "+".join(plan.config.model.recompute) or "none"
        recompute += " offload" if plan.config.optim.cpu_offload else ""
        degrees = (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.etp, layout.dp)
        rows.append([str(number), *map(str, degrees), str(plan.config.train.micro_batch_size), recompute])
        rows[-1] += [f"{p.memory.total / 1e9:.1f}", f"{p.seconds:.4g}", f"{p.tokens_per_second_per_gpu:,.0f}"]
        rows[-1] += [f"{p.flops_per_gpu / 1e12:.0f}", f"{p.mfu:.1%}", why(plan, plans[0]) if number > 1 else ""]
    text = _aligned(rows)
    have = f"GB: peak of the fullest rank's tensors, of {limit_gb:g}" if limit_gb else "GB: peak of the fullest rank"
    return f"{text}\n{have}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i in (9, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def why(plan: Plan, best: Plan) -> str:
    """The parts in which a plan takes most longer than the best one."""
    mine, other = plan.prediction.parts, best.prediction.parts
    longer = sorted(((mine[name] - other[name], name) for name in mine | other), reverse=True)
    worst = [f"{name} +{seconds:.3g} s" for seconds, name in longer[:2] if seconds > 0.02 * best.prediction.seconds]
    if worst:
        return ", ".join(worst)
    memory = plan.prediction.memory.total - best.prediction.memory.total
    return f"memory {memory / 1e9:+.3g} GB" if abs(memory) > 1e9 else "nearly the same"


def shares(plan: Plan) -> str:
    """Where the time and the memory of a plan go, in two lines, and with a pipeline the bubble of each schedule."""
    p = plan.prediction
    time = "  ".join(f"{name} {seconds / p.seconds:.0%}" for name, seconds in p.parts.most_common())
    memory = "  ".join(f"{name} {size / 1e9:.3g}" for name, size in memory_parts(p.memory).items())
    bubbles = "  ".join(f"{name} {seconds:.3g} s" for name, seconds in p.bubbles.items())
    return f"time     {time}\nmemory   {memory} GB" + (f"\nbubble   {bubbles}" if bubbles else "")


def basis(config: Config, rates: Rates, imbalance: float) -> str:
    """What the prediction rests on."""
    lines = [f"rates    {rates.source}", f"balance  the fullest rank's experts have {imbalance:g} times the mean rows"]
    if config.precision == "fp8" and config.fp8.kernels == "te":
        like = "the products of this project's own FP8 kernels, weight gradients like bf16's, nothing for padding rows"
        lines.append(f"assumed  TransformerEngine's FP8 products ({config.fp8.recipe}), never measured here, take what")
        lines.append(f"         others do: {like};")
        lines.append("         of a weight there are two copies in FP8 beside the one in bf16")
    elif config.model.transformer_impl == "transformer_engine":
        lines.append(
            "assumed  TransformerEngine's layers, never measured here, are as fast as those of PyTorch and Triton"
        )
    if config.parallel.cp_comm_type != "all_gather":
        lines.append(
            f"assumed  parallel.cp_comm_type={config.parallel.cp_comm_type} takes as long as gathering keys and values"
        )
    return "\n".join(lines)


def draw(plans: list[Plan], path: Path) -> None:
    """Memory and time of the plans by part, side by side.

    Raises:
        ValueError: matplotlib is not installed, or does not write this format.
    """
    labels = [_short(plan) for plan in plans]
    memory = [{name: size / 1e9 for name, size in memory_parts(plan.prediction.memory).items()} for plan in plans]
    time = [dict(plan.prediction.parts) for plan in plans]

    def panels(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, title in ((left, memory, "memory of the fullest rank, GB"), (right, time, "step, seconds")):
            starts = [0.0] * len(plans)
            for name in dict.fromkeys(name for value in values for name in value):
                sizes = [value.get(name, 0.0) for value in values]
                axes.barh(labels, sizes, left=starts, label=name)
                starts = [start + size for start, size in zip(starts, sizes, strict=True)]
            axes.set_title(title)
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        left.invert_yaxis()

    figure_and_save(panels, path, (12.0, 1.5 + 0.6 * len(plans)))


def figure_and_save(panels: Callable[[Any], None], path: Path, size: tuple[float, float]) -> None:
    """Writes a chart that `panels` draws into a matplotlib figure.

    Args:
        size: inches.

    Raises:
        ValueError: matplotlib is not installed, or does not write this format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plot={path} needs matplotlib: bash launch/setup.sh plots") from error
    figure = Figure(figsize=size, layout="constrained")
    panels(figure)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ValueError(
            f"plot={path}: {str(error).splitlines()[0]}; nearest: plot={path.with_suffix('.png')}"
        ) from error


def _short(plan: Plan) -> str:
    return plan.prediction.layout.describe()
