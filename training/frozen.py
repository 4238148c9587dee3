"""What optim.frozen leaves untrained, known before a model is built."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from conf.schema import Config
from parallel.layout import Layout
from training.adapters import adapter_parameters, run_cost
from training.model_shapes import logical_shapes
from training.output_redirect import redirect_output


@dataclass(frozen=True)
class Frozen:
    """Parameters without a gradient, by optim.frozen, or all but the adapters."""

    names: frozenset[str] = frozenset()
    """Logical names, by optim.frozen."""
    trained: int = 0
    """Number of parameters that are trained."""
    total: int = 0
    """Number of parameters."""
    dense_share: float = 1.0
    """Trained fraction of the parameters outside of the experts."""
    expert_share: float = 1.0
    """Trained fraction of the experts' parameters."""
    matrix_share: float = 1.0
    """Trained fraction of the hidden layers' matrices outside of the experts."""
    why: str = "optim.frozen: the others are constant"

    def describe(self) -> tuple[str, str]:
        """(choice, reason) for the start table."""
        return (
            f"{self.trained / 1e6:.4g} of {self.total / 1e6:.4g} M parameters",
            self.why,
        )


_known: dict[str, Frozen] = {}


def frozen_parameters(config: Config) -> Frozen:
    """What optim.frozen, or lora.rank, means for this model. The first call with these settings builds the model on
    meta tensors, and must come before ranks meet in this process.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    if config.lora.rank is not None:
        adapters, total = round(sum(adapter_parameters(config, Layout(1)))), run_cost(config).total
        return Frozen(frozenset(), adapters, total, 0.0, 0.0, 0.0, f"lora.rank={config.lora.rank}: the adapters")
    if not config.optim.frozen:
        return Frozen()
    key = json.dumps([asdict(config.model), config.optim.frozen], default=str)
    if key not in _known:
        _known[key] = _find(config)
    return _known[key]


def _find(config: Config) -> Frozen:
    from parallel.freezing import frozen_names

    redirection = redirect_output(0)
    try:
        shapes = logical_shapes(config.model, states=False)
        matrices = logical_shapes(config.model, matrices=True)
    finally:
        redirection.undo()
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    frozen = frozen_names(config.optim.frozen, sizes)
    trained = {name: 0 if name in frozen else size for name, size in sizes.items()}

    def share(experts: bool, among: Iterable[str] = sizes) -> float:
        names = [name for name in among if (".experts." in name) == experts]
        return sum(trained[n] for n in names) / max(1, sum(sizes[n] for n in names))

    shares = share(False), share(True), share(False, matrices)
    return Frozen(frozenset(frozen), sum(trained.values()), sum(sizes.values()), *shares)
