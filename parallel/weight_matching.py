"""Which weights a checkpoint and a model have in common: every one of either side is accounted for."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel import optimizer_state
from parallel.engine import Engine

Shape = tuple[int, ...]

_PREFIX = "weights."
_TRANSIENT = ".last_load"
"""Weights of this name are what a router saw in one step: no loss for a run that has no use for them."""


@dataclass(frozen=True)
class Mismatch:
    """Weights that a checkpoint and a model do not have in common, by name; of all ranks."""

    absent: list[str]
    """In the model alone."""
    reshaped: list[str]
    """In both, `name (shape there, shape here)`."""
    left: list[str]
    """In the checkpoint alone."""

    def __bool__(self) -> bool:
        return bool(self.absent or self.reshaped or self.left)

    def __str__(self) -> str:
        parts = {"only here": self.absent, "of another shape": self.reshaped, "only there": self.left}
        return "; ".join(f"{what}: {_few(names)}" for what, names in parts.items() if names)


def match_weights(engine: Engine, stored: dict[str, Shape]) -> tuple[Mismatch, set[str]]:
    """Every rank calls this together. State that follows a rule (Placement.is_state) may be absent: it then starts
    with its initial values.

    Args:
        stored: logical shapes of a checkpoint's tensors, by key.

    Returns:
        What does not match, and the keys that do.
    """
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (optimizer_state.logical_shapes(engine), optimizer_state.states(engine)))
    here: dict[str, Shape] = {name: shape for shapes, _ in of_ranks for name, shape in shapes.items()}
    states = {name for _, names in of_ranks for name in names}
    there = {key.removeprefix(_PREFIX): shape for key, shape in stored.items() if key.startswith(_PREFIX)}
    same = {name for name, shape in here.items() if there.get(name) == shape}
    reshaped = sorted((here.keys() & there.keys()) - same)
    mismatch = Mismatch(
        absent=sorted(here.keys() - there.keys() - states),
        reshaped=[f"{name} ({there[name]} there, {here[name]} here)" for name in reshaped],
        left=sorted(name for name in there.keys() - here.keys() if not name.endswith(_TRANSIENT)),
    )
    return mismatch, {_PREFIX + name for name in same}


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
