"""`python -m benchmarks.rates day.jsonl > conf/cluster/rates/CARD.json`: the rates of a GPU that `launch.plan` computes
with, from what tests/gpu/stages/rates.py measured on it. A rate is the median of all products of its class."""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]
NARROW = (768, 1536, 2048)
"""Classes of grouped products by the smaller of K and N, each up to the next."""


def curve(points: Iterable[tuple[float, float]]) -> Curve:
    """(x, TFLOP/s): the medians by powers of two of x."""
    found: dict[int, list[float]] = defaultdict(list)
    for x, tflops in points:
        found[round(math.log2(x))].append(tflops)
    return [(float(2**power), round(statistics.median(values), 1)) for power, values in sorted(found.items())]


def narrow_class(inner: float, outer: float) -> int:
    return max((width for width in NARROW if width <= min(inner, outer)), default=NARROW[0])


def rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {row["what"]: row for row in rows if row.get("stage") == "rates" and "rows" in row}
    optimizer = next(row for row in rows if row.get("what") == "optimizer" and "adamw" in row)
    largest = max(found["memory"]["rows"])
    dense = [(2 * m * k * n, ms) for m, k, n, *times in found["dense"]["rows"] for ms in times]
    narrow = [(2 * m * k * n, ms) for m, k, n, *times in found["linear_fp8"]["rows"] for ms in times]
    ahead = [(2 * e * r * k * n, r, (k, n), t) for e, r, k, n, *t in found["grouped"]["rows"]]
    fp8 = [(2 * e * r * k * n, r, (k, n), [ours]) for e, r, k, n, ours, _ in found["grouped_fp8"]["rows"]]

    def grouped(products: list[Any], which: slice) -> dict[str, Curve]:
        points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for flops, each, widths, times in products:
            points[narrow_class(*widths)] += [(each, flops / ms / 1e9) for ms in times[which]]
        return {str(width): curve(found) for width, found in sorted(points.items())}

    def attention(column: int, factor: float) -> dict[str, Curve]:
        points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for batch, heads, width, values, sequence, *times in found["attention"]["rows"]:
            flops = factor * batch * heads * sequence**2 * (width + values)
            points[width].append((sequence, flops / times[column] / 1e9))
        return {str(width): curve(of) for width, of in sorted(points.items())}

    return {
        "memory_gb_per_s": round(largest[0] / largest[1] / 1e6),
        "adamw_ms_per_billion": round(optimizer["adamw"] / optimizer["parameters"] * 1e9, 2),
        "dense": curve((flops, flops / ms / 1e9) for flops, ms in dense),
        "dense_fp8": curve((flops, flops / ms / 1e9) for flops, ms in narrow),
        "grouped": grouped(ahead, slice(2)),
        "grouped_weight_gradient": grouped(ahead, slice(2, 3)),
        "grouped_fp8": grouped(fp8, slice(1)),
        "attention": attention(0, 1.0),
        "attention_backward": attention(1, 2.5),
    }


def text(values: dict[str, Any]) -> str:
    """JSON with a curve a line."""
    lines: Callable[[Any], str] = lambda value: (  # noqa: E731
        "{\n    " + ",\n    ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
        if isinstance(value, dict)
        else json.dumps(value)
    )
    return "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {lines(value)}" for key, value in values.items()) + "\n}\n"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.rates FOLDER/day.jsonl", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in Path(arguments[0]).read_text().splitlines()]
    print(text(rates(rows)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
