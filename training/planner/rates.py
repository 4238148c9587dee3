"""How long a GPU takes for a product, for attention or for a pass over memory: measured rates (conf/cluster/rates).

Legend: M rows, K inner and N outer dimension, L experts.
"""

import bisect
import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "cluster" / "rates"
TERA = 1e12

Curve = list[tuple[float, float]]
"""(x, TFLOP/s), by increasing x."""


def interpolated(curve: Curve, x: float) -> float:
    """TFLOP/s at x, linear in log x. Below the first point the time is that of the first point's work, since launches
    and idle multiprocessors bound it; above the last one the rate is constant."""
    xs = [point for point, _ in curve]
    if x <= xs[0]:
        return curve[0][1] * x / xs[0]
    if x >= xs[-1]:
        return curve[-1][1]
    after = bisect.bisect_right(xs, x)
    (x0, y0), (x1, y1) = curve[after - 1], curve[after]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


@dataclass(frozen=True)
class Rates:
    """A GPU's measured rates. Times are in seconds."""

    source: str
    """Where the figures are from."""
    peak: float
    """Dense bf16 peak in FLOP/s, for the MFU."""
    memory: float
    """Bytes per second of a large copy, read and written."""
    scale: float
    """Factor of all rates of products relative to those in `curves`."""
    curves: dict[str, Any]
    host: dict[str, float]
    """Seconds of the host to launch a layer's forward and backward pass: sparse and dense."""
    _known: dict[Any, float] = field(default_factory=dict, compare=False)

    def dense(self, rows: float, inner: float, outer: float, *, fp8: bool = False) -> float:
        """One product [M, K] x [K, N]; in FP8 with the casts of its operands."""
        key = (rows, inner, outer, fp8)
        if key not in self._known:
            flops = 2 * rows * inner * outer
            rate = interpolated(self.curves["dense"], flops)
            rate = max(rate, interpolated(self.curves["dense_fp8"], flops)) if fp8 else rate
            self._known[key] = flops / (rate * TERA * self.scale)
        return self._known[key]

    def grouped(self, experts: float, rows: float, inner: float, outer: float, *, fp8: bool = False) -> float:
        """The products [M, K] x [K, N] of L experts with M rows each, forward or input gradient."""
        rate = self._grouped("grouped", rows, inner, outer)
        rate = max(rate, self._grouped("grouped_fp8", rows, inner, outer)) if fp8 else rate
        return 2 * experts * rows * inner * outer / (rate * TERA * self.scale)

    def grouped_weight_gradient(self, experts: float, rows: float, inner: float, outer: float) -> float:
        """The products [K, M] x [M, N] of L experts."""
        rate = self._grouped("grouped_weight_gradient", rows, inner, outer)
        return 2 * experts * rows * inner * outer / (rate * TERA * self.scale)

    def _grouped(self, name: str, rows: float, inner: float, outer: float) -> float:
        classes = self.curves[name]
        width = max((int(w) for w in classes if int(w) <= min(inner, outer)), default=min(map(int, classes)))
        return interpolated(classes[str(width)], max(rows, 1.0))

    def attention(self, flops: float, width: int, sequence: float, *, backward: bool = False) -> float:
        """Causal attention with heads of this width (of queries and keys); flops of the forward pass."""
        classes = self.curves["attention_backward" if backward else "attention"]
        nearest = min(classes, key=lambda w: abs(int(w) - width))
        rate = interpolated(classes[nearest], sequence)
        return flops * (2.5 if backward else 1.0) / (rate * TERA * self.scale)


def has_rates(cluster: str | None) -> bool:
    """Whether there are rates of a cluster preset's GPUs."""
    return cluster is not None and (FOLDER / f"{cluster}.json").is_file()


@cache
def rates_of(cluster: str | None) -> Rates:
    """The rates of the GPUs of a cluster preset.

    Raises:
        ValueError: there are none for it.
    """
    path = FOLDER / f"{cluster}.json"
    if cluster is None or not has_rates(cluster):
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
        raise ValueError(
            f"launch.plan has no rates for cluster={cluster or 'any'}: it plans for {known}, and for another machine "
            "with cluster=h100 and that machine's cluster.memory_gb, cluster.link_gb_per_s and so on"
        )
    values: dict[str, Any] = json.loads(path.read_text())
    base: dict[str, Any] = json.loads((FOLDER / f"{values.get('based_on', cluster)}.json").read_text())
    merged = base | values
    return Rates(
        source=values["source"],
        peak=merged["peak_bf16_tflops"] * TERA,
        memory=merged["memory_gb_per_s"] * 1e9,
        scale=merged["peak_bf16_tflops"] / base["peak_bf16_tflops"],
        curves=base,
        host={kind: ms / 1e3 for kind, ms in base["host_ms"].items()},
    )
