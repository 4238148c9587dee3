"""Saves and restores the states of a rank's random number generators as tensors. The model does not use these
generators; libraries may."""

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_TRACKER = "tracker."
"""Prefix of the names of Megatron-Core's generators."""


def _tracker() -> Any:
    """Megatron-Core's generators."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def random_state() -> dict[str, Tensor]:
    """Name of each generator's state -> int64, float64 or uint8 tensor."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    states = {
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked: dict[str, Any] = _tracker().get_states()
    return states | {f"{_TRACKER}{name}": state.cpu().clone() for name, state in tracked.items()}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a state by its name."""
    return {"python": torch.int64, "numpy": torch.int64}.get(name, torch.float64 if "gauss" in name else torch.uint8)


def restore_random_state(states: dict[str, Tensor]) -> None:
    version, *internal = states["python"].tolist()
    has_gauss, gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss if has_gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    _tracker().set_states(tracked)
