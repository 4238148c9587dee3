"""The study as text: the table that the command prints, and the figures in docs/sparse_vs_dense.md."""

import re
from pathlib import Path
from typing import Any

from benchmarks.sparse_vs_dense.plot import label

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "sparse_vs_dense.md"
MARK = re.compile(r"(<!-- study: ([a-z-]+) -->\n).*?(<!-- end -->)", re.S)


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def with_interval(value: float | None, bounds: list[float] | None, form: str = "{:.2f}") -> str:
    """1.50 [1.40, 1.60]"""
    return number(value, form) + ("" if bounds is None else f" [{', '.join(number(b, form) for b in bounds)}]")


def ratio_cell(of: dict[str, Any]) -> str:
    """A speed-up with its interval, or how many seeds did not reach the loss."""
    if of["not_reached"]:
        return f"not reached ({of['not_reached']} of {len(of['of_seeds'])})"
    return with_interval(of["speedup"], of["interval"])


Table = tuple[list[str], list[list[str]]]
"""Titles and rows."""


def model_table(result: dict[str, Any], batch: str) -> Table:
    head = ["model", "FLOPs/token", "seeds", "held-out", "difference", "s/step"]
    head += ["speed-up, steps", "seconds", "FLOPs", "steps, held-out"]
    body = []
    for name, of in result["batches"][batch]["models"].items():
        flops = result["models"][name]["flops_over_dense"]
        row = [label(result, name), f"{flops:.3f}", str(len(of["seeds"])), f"{of['held_out']:.4f}"]
        if "speedup" in of:
            final = of["speedup"]["final"]
            row += [with_interval(of["difference"], of["difference_interval"], "{:+.4f}"), f"{of['step_seconds']:.3f}"]
            row += [ratio_cell(final[over]) for over in ("steps", "seconds", "flops")]
            row.append(ratio_cell(of["speedup_by_held_out"]["steps"]))
        else:
            row += ["", f"{of['step_seconds']:.3f}", "1", "1", "1", "1"]
        body.append(row)
    return head, body


def held_out_table(result: dict[str, Any], batch: str, columns: int = 5) -> Table:
    """Held-out loss at equal steps."""
    models = result["batches"][batch]["models"]
    steps = next(iter(models.values()))["held_out_curve"]["steps"]
    chosen = sorted({round((len(steps) - 1) * (i + 1) / columns) for i in range(columns)})
    head = ["held-out loss at step", *(f"{steps[i]:.0f}" for i in chosen)]
    return head, [
        [label(result, name), *(f"{of['held_out_curve']['loss'][i]:.4f}" for i in chosen)]
        for name, of in models.items()
    ]


def level_table(result: dict[str, Any], batch: str) -> Table:
    """Speed-up in steps at several losses."""
    models = {name: of for name, of in result["batches"][batch]["models"].items() if "speedup" in of}
    head, body = ["speed-up in steps at a loss of"], []
    for name, of in models.items():
        levels = [*of["speedup"]["levels"], of["speedup"]["final"]]
        if len(head) == 1:
            head += [f"{level['loss']:.3f}" for level in levels]
        body.append([label(result, name), *(ratio_cell(level["steps"]) for level in levels)])
    return head, body


def inference_table(pairs: list[dict[str, Any]], result: dict[str, Any]) -> Table:
    head = [
        "sparse",
        "loss",
        "dense of nearest loss",
        "loss",
        "forward GFLOPs/token",
        "tokens/s",
        "FLOPs saved",
        "speed",
    ]
    body = []
    for pair in pairs:
        mine, other = pair["of_sparse"], pair["of_dense"]
        flops = [f"{of['forward_flops_per_token'] / 1e9:.4f}" for of in (mine, other)]
        speeds = [f"{of['tokens_per_second']:,.0f}" for of in (mine, other)]
        row = [
            label(result, pair["sparse"]),
            f"{mine['loss']:.4f}",
            label(result, pair["dense"]),
            f"{other['loss']:.4f}",
        ]
        row += [" / ".join(flops), " / ".join(speeds), f"{pair['flops_saving']:.2f}x", f"{pair['speed_ratio']:.2f}x"]
        body.append(row)
    return head, body


def trend_text(fitted: dict[str, Any] | None, by: str) -> str:
    """The fit in sentences, with what is extrapolated."""
    if fitted is None:
        return f"By {by}: no trend, which needs two numbers of experts with which every seed reached the dense loss."
    per = with_interval(fitted["per_doubling"], fitted["per_doubling_interval"], "{:+.3f}")
    text = f"By {by}: speed-up = {fitted['at_one']:.2f} + {per} log2 E, fitted to E = "
    text += ", ".join(map(str, fitted["experts"])) + "."
    if fitted["left_out"]:
        text += f" E = {', '.join(map(str, fitted['left_out']))} did not reach the dense loss and is left out."
    at, largest = fitted["experts_at_target"], max(fitted["experts"])
    if at is None:
        return text + f" The line does not reach {fitted['target']:g}x."
    size = fitted["parameters_at_target"]
    text += f" It reaches {fitted['target']:g}x at E = {at:,.4g}"
    bounds = fitted["experts_at_target_interval"]
    if bounds is not None:
        text += f" [{', '.join('never' if b is None else f'{b:,.4g}' for b in bounds)}]"
    text += f", {size / 1e6:,.0f} M parameters" if size else ""
    if at > largest:
        text += f"; this is an extrapolation beyond the measured {largest}, not a measurement"
    return text + "."


def equal_parameters_text(of: dict[str, Any], result: dict[str, Any]) -> list[str]:
    lines = []
    for name, pair in of.items():
        flops = [result["models"][each]["flops_per_token"] / 1e6 for each in (name, pair["dense"])]
        lines.append(
            f"{label(result, name)} ({flops[0]:.1f} MFLOPs/token) beside {label(result, pair['dense'])} "
            f"({flops[1]:.1f}): held-out {pair['held_out']:.4f} and {pair['held_out_of_dense']:.4f}; to the lowest "
            f"loss that both reach, the dense one needs {ratio_cell(pair['flops'])} times the FLOPs and "
            f"{ratio_cell(pair['steps'])} times the steps."
        )
    return lines


def method(result: dict[str, Any]) -> list[str]:
    seeds = max((len(of["seeds"]) for b in result["batches"].values() for of in b["models"].values()), default=0)
    lines = [
        f"Basis: {result['steps']} steps each, on the same batches for each seed, at a constant learning rate after "
        "the warm-up. Speed-up: what the dense twin needs to reach its own last loss, over what the model needs to "
        "reach it, geometric mean of the seeds. Its losses are training losses, the mean of "
        f"{result['smoothed_steps']} steps (no text is repeated, so that they are losses on new text); in the last "
        "column they are held-out losses, on straight lines between evaluations. Seconds are those of training steps, "
        "on a machine that may have other load."
    ]
    if seeds == 1:
        lines.append("One seed: no interval, and a difference may be chance.")
    elif seeds:
        lines.append(
            f"In brackets: 95 % of bootstrap samples of {seeds} pairs of seeds"
            + (", with so few not wider than their range, and narrower than the truth." if seeds < 6 else ".")
        )
    return lines


def _lines(table: Table, *, markdown: bool) -> list[str]:
    head, body = table
    if markdown:
        rule = "|" + "---|" * len(head)
        return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in body)]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in [head, *body]
    ]


def text(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The whole study, as tables of plain text or of Markdown."""
    lines = [f"{result['corpus_line']}.", "", f"Machine: {result['machine']}.", ""]
    for paragraph in method(result):
        lines += [paragraph, ""]
    for batch, found in result["batches"].items():
        lines += [f"{'### ' if markdown else ''}{batch} sequences a step", ""]
        lines += [*_lines(model_table(result, batch), markdown=markdown), ""]
        lines += [*_lines(held_out_table(result, batch), markdown=markdown), ""]
        levels = level_table(result, batch)
        lines += [*_lines(levels, markdown=markdown), ""] if levels[1] else []
        for paragraph in equal_parameters_text(found["against_equal_parameters"], result):
            lines += [paragraph, ""]
        lines += [
            trend_text(found["trend"], "training loss"),
            "",
            trend_text(found["trend_by_held_out"], "held-out loss"),
            "",
        ]
    if result.get("inference"):
        lines += ["### Inference" if markdown else "Inference", ""]
        lines += [*_lines(inference_table(result["inference"], result), markdown=markdown), ""]
    if not result["batches"]:
        lines += ["No run of the dense model is finished yet.", ""]
    return "\n".join(lines)


def write_docs(result: dict[str, Any], path: Path = DOCUMENT) -> None:
    """Fills the document's block. Raises ValueError: it has none."""
    command = f"    {result['command']}\n\n"
    content, count = MARK.subn(
        lambda match: match[1] + "\n" + command + text(result, markdown=True) + match[3], path.read_text()
    )
    if not count:
        raise ValueError(f"{path} has no <!-- study: NAME --> ... <!-- end -->")
    path.write_text(content)
