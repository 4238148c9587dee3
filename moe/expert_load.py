"""What the routers did over an interval, in plain numpy: for the log, the table at the end and TensorBoard.

Legend: L sparse layers, E experts.
"""

from dataclasses import dataclass

import numpy as np

from moe.router_metrics import ROUTER_METRICS, load_share


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """The same on every rank."""

    layer_ids: list[int]
    """[L], counted from 0 over all layers, dense ones included."""
    load_LE: np.ndarray
    """[L, E]: assignments of each expert, counted before drops."""
    reduced: dict[str, np.ndarray]
    """[L] of each router metric that is computed in the layers (moe.router_metrics)."""

    @property
    def share_LE(self) -> np.ndarray:
        """[L, E]: share of the layer's assignments; zeros for a layer without any."""
        return load_share(self.load_LE)

    @property
    def dropped_L(self) -> np.ndarray:
        """[L]: dropped fraction of the assignments."""
        return self.metric("dropped_fraction")

    def metric(self, name: str) -> np.ndarray:
        """[L]: a router metric of each layer."""
        of_load = ROUTER_METRICS[name].of_load
        return self.reduced[name] if of_load is None else of_load(self.load_LE)

    def as_row(self) -> dict[str, float | int]:
        """Every router metric, reduced over the layers."""
        return {name: metric.over_layers(self.metric(name)) for name, metric in ROUTER_METRICS.items()}
