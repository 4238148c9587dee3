"""What the routers did over an interval, in plain numpy: for the log, the table at the end and TensorBoard.

Legend: L sparse layers, E experts.
"""

from dataclasses import dataclass

import numpy as np

COLUMNS = (
    "aux_loss",
    "z_loss",
    "dropped_fraction",
    "unserved_fraction",
    "load_max_over_mean",
    "load_cv",
    "router_entropy",
    "router_logit_rms",
    "dead_experts",
)
"""What metrics.jsonl says of the routers; null for a dense model."""


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """The same on every rank."""

    layer_ids: list[int]
    """[L], counted from 0 over all layers, dense ones included."""
    load_LE: np.ndarray
    """[L, E]: choices of each expert, counted before drops."""
    dropped_L: np.ndarray
    """[L]: dropped fraction of the choices."""
    unserved_L: np.ndarray
    """[L]: fraction of the tokens that no expert computed: all their choices were dropped, or no expert chose them."""
    entropy_L: np.ndarray
    """[L]: mean entropy of the router's distribution in nats."""
    logit_rms_L: np.ndarray
    """[L]: root mean square of the router's logits; grows where a router becomes unstable."""
    aux_loss_L: np.ndarray
    z_loss_L: np.ndarray
    """[L]: means over micro-batches, without coefficients."""

    @property
    def share_LE(self) -> np.ndarray:
        """[L, E]: share of the layer's choices; zeros for a layer without any."""
        return self.load_LE / np.maximum(self.load_LE.sum(axis=1, keepdims=True), 1)

    @property
    def max_over_mean_L(self) -> np.ndarray:
        """[L]: load of the busiest expert relative to the mean; 1 is perfect balance."""
        return self.share_LE.max(axis=1) * self.load_LE.shape[1]

    @property
    def cv_L(self) -> np.ndarray:
        """[L]: coefficient of variation of the loads, their standard deviation over their mean; 0 is perfect balance
        (Shazeer et al. 2017, arXiv:1701.06538, section 4)."""
        return self.share_LE.std(axis=1) * self.load_LE.shape[1]

    def as_row(self) -> dict[str, float | int]:
        """COLUMNS: means over layers, but the worst layer's imbalance, logits and dead experts."""
        values = (
            float(self.aux_loss_L.mean()),
            float(self.z_loss_L.mean()),
            float(self.dropped_L.mean()),  # every layer routes equally many choices
            float(self.unserved_L.mean()),
            float(self.max_over_mean_L.max()),
            float(self.cv_L.max()),
            float(self.entropy_L.mean()),
            float(self.logit_rms_L.max()),
            int((self.load_LE == 0).sum(axis=1).max()),
        )
        return dict(zip(COLUMNS, values, strict=True))
