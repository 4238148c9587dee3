"""Draws a study: the loss over steps, seconds and FLOPs, each a panel, for the first batch size."""

from pathlib import Path
from typing import Any

from benchmarks.sparse_vs_dense.runs import DENSE
from training.planner.report import figure_and_save

PANELS = (("steps", "steps"), ("flops", "FLOPs"), ("seconds", "seconds of training steps"))


def draw(result: dict[str, Any], path: Path) -> None:
    """A line for each model, the mean of its seeds: training loss as a line, held-out loss as points.

    Raises:
        ValueError: no run is finished, matplotlib is not installed or does not write this format.
    """
    if not result["batches"]:
        raise ValueError(f"--plot {path}: no run of the dense model is finished yet")
    batch, found = next(iter(result["batches"].items()))

    def panels(figure: Any) -> None:
        row = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (over, title) in zip(row, PANELS, strict=True):
            for number, (name, of) in enumerate(found["models"].items()):
                colour = "black" if name == DENSE else f"C{number - 1}"
                style = "--" if result["models"][name]["experts"] is None else "-"
                training, held_out = of["training_curve"], of["held_out_curve"]
                axes.plot(training[over], training["loss"], style, color=colour, linewidth=1, label=label(result, name))
                axes.plot(held_out[over], held_out["loss"], "o", color=colour, markersize=3)
            axes.set_xlabel(title)
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("loss, nats per token")
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
        note = f"lines: training, mean of {result['smoothed_steps']} steps; points: held-out; {batch} sequences a step"
        figure.supxlabel(note, fontsize="small")

    figure_and_save(panels, path, (12.0, 4.5))


def label(result: dict[str, Any], name: str) -> str:
    """Kind and parameters of a model."""
    of = result["models"][name]
    kind = f"{of['experts']} experts" if of["experts"] else "dense" if name == DENSE else "dense, wider"
    return f"{kind}, {of['parameters'] / 1e6:.1f} M"
