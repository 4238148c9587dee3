"""The metrics of a router: what each is computed from, and how it is reduced to one number per logged step.

Legend: T tokens of this rank, E experts, K assignments per token, L sparse layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from conf.registry import Registry

if TYPE_CHECKING:  # the console imports this before it is known that the settings are right
    from torch import Tensor

    from ops.routing import RouterStats, Routing


@dataclass(frozen=True)
class RouterPass:
    """One forward pass of a sparse layer over this rank's tokens. Metrics are computed without gradients."""

    routing: "Routing"
    """Logits [T, E], gates and experts of each token [T, K], and sums over tokens of the scores."""
    keep_TK: "Tensor"
    """bool: the assignments that found room at their expert."""
    aux_loss: "Tensor"
    """This rank's part of the micro-batch's load-balancing loss, without its coefficient."""
    z_loss: "Tensor"
    """The same of the router z-loss."""
    padding_T: "Tensor | None"
    """bool: True where there is no token. None: there is one everywhere."""

    @property
    def stats(self) -> "RouterStats":
        return self.routing.router_stats


@dataclass(frozen=True)
class RouterMetric:
    """A key of metrics.jsonl and of TensorBoard (train/NAME, and of each layer moe/layer_NN/NAME).

    Either `compute` is given or `of_load`.
    """

    name: str
    layers: Literal["mean", "max", "sum"]
    """How the layers' values become one."""
    compute: "Callable[[RouterPass], Tensor] | None" = None
    """A value of each token [T], of which padding is left out, or a scalar that is reduced over this rank's tokens
    already."""
    reduction: Literal["mean", "sum", "max"] = "mean"
    """How values are reduced over tokens, ranks and the micro-batches of the interval that is logged."""
    mean_over: Literal["tokens", "assignments", "micro_batches"] = "tokens"
    """What the sum is divided by with reduction="mean"."""
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    """Applied to the reduced values [L]."""
    of_load: Callable[[np.ndarray], np.ndarray] | None = None
    """Of the assignments of every expert over the interval [L, E], before drops, to [L]."""
    per_layer: str | None = ""
    """The name in TensorBoard's series per layer. Empty: as `name`; None: there are none."""

    def __post_init__(self) -> None:
        if (self.compute is None) == (self.of_load is None):
            raise ValueError(f"router metric {self.name}: give one of compute and of_load")

    @property
    def layer_series(self) -> str | None:
        return self.name if self.per_layer == "" else self.per_layer

    def over_layers(self, value_L: np.ndarray) -> float | int:
        return {"mean": value_L.mean, "max": value_L.max, "sum": value_L.sum}[self.layers]().item()


def load_share(load_LE: np.ndarray) -> np.ndarray:
    """[L, E]: each expert's share of its layer's assignments; zeros for a layer without any."""
    return load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)


def _dropped(layer: RouterPass) -> "Tensor":
    return layer.stats.load_BE.sum() - layer.keep_TK.sum()


def _unserved(layer: RouterPass) -> "Tensor":
    """Tokens that no expert computes."""
    served_T, padding_T = layer.keep_TK.any(1), layer.padding_T
    tokens = len(served_T) if padding_T is None else (~padding_T).sum()
    return tokens - served_T.sum()


def _max_over_mean(load_LE: np.ndarray) -> np.ndarray:
    """Load of the busiest expert over the mean load; 1 is perfect balance."""
    return load_share(load_LE).max(axis=1) * load_LE.shape[1]


def _coefficient_of_variation(load_LE: np.ndarray) -> np.ndarray:
    """Standard deviation of the loads over their mean (Shazeer et al. 2017, arXiv:1701.06538, section 4)."""
    return load_share(load_LE).std(axis=1) * load_LE.shape[1]


ROUTER_METRICS = Registry(
    "router metric",
    RouterMetric("aux_loss", "mean", lambda layer: layer.aux_loss, mean_over="micro_batches", per_layer=None),
    RouterMetric("z_loss", "mean", lambda layer: layer.z_loss, mean_over="micro_batches", per_layer=None),
    # Every layer routes equally many assignments.
    RouterMetric("dropped_fraction", "mean", _dropped, mean_over="assignments"),
    RouterMetric("unserved_fraction", "mean", _unserved),
    RouterMetric("load_max_over_mean", "max", of_load=_max_over_mean),
    RouterMetric("load_cv", "max", of_load=_coefficient_of_variation),
    # In nats, of the router's distribution.
    RouterMetric("router_entropy", "mean", lambda layer: layer.stats.entropy, per_layer="entropy"),
    # Root mean square: it grows where a router becomes unstable.
    RouterMetric(
        "router_logit_rms", "max", lambda layer: layer.stats.logit_square, transform=np.sqrt, per_layer="logit_rms"
    ),
    RouterMetric("dead_experts", "max", of_load=lambda load_LE: (load_LE == 0).sum(axis=1)),
)
"""What metrics.jsonl says of the routers, in this order; null for a dense model. A metric is added before the model is
built."""
