"""`python -m tests.gpu.report day.jsonl`: writes the tables of docs/kernels.md and docs/speed.md that a GPU fills, each
between its two marks, so that no figure is copied by hand. Prints what it wrote."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"(<!-- gpu: ([a-z-]+) -->\n).*?(<!-- end -->)", re.S)


def overview(rows: Rows) -> str:
    """What a person reads at the end of the day: each stage, and each result in a line."""
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        ends = [row for row in rows if row["stage"] == stage and "status" in row]
        lines.append(f"{stage}: {ends[-1]['status'] if ends else 'no end was written'}")
        for row in rows:
            if row["stage"] == stage and "what" in row:
                lines.append(f"  {row['what']:36} {_short(row)}")
    return "\n".join(lines)


def _short(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    values = {k: v for k, v in row.items() if k not in ("stage", "what", "top_kernels", "table", "kernels", "failed")}
    return "  ".join(f"{name} {_figure(value)}" for name, value in values.items())[:400]


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_figure(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def table(head: list[str], body: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(_figure(cell) for cell in row) + " |" for row in body)])


def of(rows: Rows, stage: str) -> Rows:
    """The results of a stage, in order."""
    return [row for row in rows if row["stage"] == stage and "what" in row]


def card(rows: Rows) -> str:
    """Which card gave the figures, with its ceilings as far as they were measured on the same day."""
    found = {row["what"]: row for row in of(rows, "ceilings")}
    versions, product, copy = (found.get(name, {}) for name in ("versions", "product", "copy"))
    started = ({what: choice for what, choice, _ in row["table"]} for row in rows if "table" in row)
    device = versions.get("device") or next((table["device"] for table in started), "an unknown device")
    words = [device, *(f"{name} {versions[name]}" for name in ("torch", "triton", "driver") if versions.get(name))]
    if "tflops" in product:
        words.append(f"{product['tflops']:.0f} TFLOP/s in a bf16 product of {product['size']}³")
    if "gb_per_s" in copy:
        words.append(f"{copy['gb_per_s']:.0f} GB/s in a copy")
    return ", ".join(words) + ".\n"


def correctness(rows: Rows) -> str:
    body = []
    for row in of(rows, "correctness"):
        if "error" in row:
            body.append([row["what"], "failed", row["error"].replace("|", "/")])
        else:
            worst = max(row["errors"], key=lambda name: row["errors"][name])
            body.append([row["what"], row["errors"][worst], f"{worst}, at most {row['bar']:g}"])
    return card(rows) + "\n" + table(["kernel", "largest relative error", "of"], body) + "\n"


def gemm(rows: Rows) -> str:
    """Ratios to dense cuBLAS of as much arithmetic (of a copy where memory is the bound), and TFLOP/s or GB/s."""
    parts = [card(rows)]
    for row in of(rows, "gemm"):
        if "error" in row:
            parts.append(f"{row['what']}: {row['error']}\n")
            continue
        unit = "tflops" if "tflops" in row else "gb_per_s"
        head = [row["what"], "TFLOP/s" if unit == "tflops" else "GB/s", "ratio"]
        body = [[name, round(value, 1), round(row["ratio"][name], 3)] for name, value in row[unit].items()]
        body += [[name, "does not run", why.replace("|", "/")] for name, why in row.get("failed", {}).items()]
        parts.append(table(head, body) + "\n")
    return "\n".join(parts)


def steps(rows: Rows) -> str:
    names = ("tokens_per_second", "tflops", "mfu_of_bf16_peak", "peak_gb", "estimated_gb", "launches", "host_waits")
    body = []
    for row in of(rows, "steps"):
        if row["what"] == "batch":
            continue
        cells = [row["error"].replace("|", "/")] if "error" in row else [row.get(name, "") for name in names]
        body.append([row["what"], *cells, row.get("idle_share", "")])
    return card(rows) + "\n" + table(["model, trainer", *names, "idle_share"], body) + "\n"


def whole(rows: Rows) -> str:
    names = ("tokens_per_second", "tflops", "seconds", "peak_gb", "estimated_gb", "launches", "idle_share")
    body = []
    for row in of(rows, "whole"):
        cells = [row["error"].replace("|", "/")] if "error" in row else [row.get(name, "") for name in names]
        body.append([f"`{row['what']}`", *cells])
    return card(rows) + "\n" + table(["run", *names], body) + "\n"


def train(rows: Rows) -> str:
    found = [*of(rows, "train"), *of(rows, "ranks"), *of(rows, "sanitizer")]
    body = [[row["what"], _short(row).replace("|", "/")] for row in found]
    return card(rows) + "\n" + table(["what", "result"], body) + "\n"


TABLES: dict[str, Callable[[Rows], str]] = {
    "correctness": correctness,
    "gemm": gemm,
    "steps": steps,
    "whole": whole,
    "train": train,
}


def write(rows: Rows, documents: list[Path]) -> list[str]:
    """Fills every pair of marks of the documents whose stage has results. Returns the names of the tables."""
    written = []
    for path in documents:

        def fill(match: re.Match[str]) -> str:
            name = match[2]
            stages = ("train", "ranks", "sanitizer") if name == "train" else (name,)
            if not any(of(rows, stage) for stage in stages):
                return match[0]
            written.append(name)
            return match[1] + TABLES[name](rows) + match[3]

        path.write_text(MARK.sub(fill, path.read_text()))
    return written


def main(argv: list[str]) -> int:
    from tests.gpu.day import read

    if len(argv) != 1:
        print("usage: python -m tests.gpu.report FOLDER/day.jsonl", file=sys.stderr)
        return 2
    rows = read(Path(argv[0]))
    print(overview(rows))
    print("written:", ", ".join(write(rows, [ROOT / "docs/kernels.md", ROOT / "docs/speed.md"])) or "nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
