"""Draws a run for the README: `pip install matplotlib`, then `python -m docs.picture RUN docs/run.png`."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(run_dir: Path, picture: Path) -> None:
    """Loss and expert load of metrics.jsonl, side by side."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "val_loss" in line]
    at = [line["step"] for line in steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(at, [line["loss"] for line in steps], color="#9db4c0", label="training")
    *short, final = held_out
    left.plot([line["step"] for line in short], [line["val_loss"] for line in short], color="#1b4965", label="held out")
    left.plot(final["step"], final["val_loss"], "o", color="#1b4965", label="held out, the whole text")
    left.set(xlabel="step", ylabel="nats per token", title="cross-entropy")
    left.legend(frameon=False)
    right.plot(at, [line["load_max_over_mean"] for line in steps], color="#bc6c25", label="busiest expert / mean")
    right.set(xlabel="step", title="balance of the worst sparse layer", ylim=(0, None))
    share = right.twinx()
    share.plot(at, [100 * line["dropped_fraction"] for line in steps], color="#606c38", label="dropped assignments, %")
    share.set(ylim=(0, 100))
    handles = [*right.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    right.legend(handles, [h.get_label() for h in handles], frameon=False)
    for axes in (left, right, share):
        axes.spines["top"].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
