"""TransformerEngine's FP8 recipes and its autocast: made of the settings, and checked for what the installed version
and the GPU have."""

import contextlib
import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import Fp8Config
from ops import te
from ops.operation import Unavailable


@dataclass(frozen=True)
class Kind:
    """What fp8.recipe asks for."""

    class_name: str
    """Of transformer_engine.common.recipe."""
    since: str
    """The version that has it first."""
    support: str
    """Of TransformerEngine's questions about the GPU, each answered by (whether it can, why it cannot)."""
    instead: tuple[str, ...]
    """Other recipes, the nearest first."""


KINDS = {
    "delayed": Kind("DelayedScaling", "2.0", "is_fp8_available", ("tensorwise", "blockwise", "mxfp8")),
    "tensorwise": Kind("Float8CurrentScaling", "2.2", "is_fp8_available", ("delayed", "blockwise", "mxfp8")),
    "blockwise": Kind(
        "Float8BlockScaling", "2.3", "is_fp8_block_scaling_available", ("mxfp8", "tensorwise", "delayed")
    ),
    "mxfp8": Kind("MXFP8BlockScaling", "2.0", "is_mxfp8_available", ("blockwise", "tensorwise", "delayed")),
}
"""By the setting's value. MXFP8 is for Blackwell, and from compute capability 12.0 on not any more."""


def engine() -> Any:
    """The module transformer_engine.pytorch.

    Raises:
        ModuleNotFoundError, Unavailable: see ops.te.load.
    """
    return te.load(lambda: importlib.import_module("transformer_engine.pytorch"))


def version() -> str:
    return str(getattr(importlib.import_module("transformer_engine"), "__version__", "of an unknown version"))


def missing(recipe: str) -> str | None:
    """What a recipe lacks here, in words that follow its name; None: nothing."""
    engine()
    kind = KINDS[recipe]
    if not hasattr(importlib.import_module("transformer_engine.common.recipe"), kind.class_name):
        return f"needs TransformerEngine {kind.since} or newer, and {version()} is installed"
    state = _state_manager()
    can, why = getattr(state, kind.support)()
    return None if can else f"is not for this GPU ({why.strip().rstrip('.')})"


def _state_manager() -> Any:
    """FP8GlobalStateManager, which moved in 2.9."""
    try:
        module = importlib.import_module("transformer_engine.pytorch.quantization")
    except ImportError:
        module = importlib.import_module("transformer_engine.pytorch.fp8")
    return module.FP8GlobalStateManager


def forget_layers() -> None:
    """Of a trial, whose amaxes would be reduced with those of the model."""
    _state_manager().reset()


def check(recipe: str) -> None:
    """Raises Unavailable with what a recipe lacks, and the nearest that works here."""
    if (lacks := missing(recipe)) is None:
        return
    works = next((other for other in KINDS[recipe].instead if missing(other) is None), None)
    nearest = f"fp8.recipe={works}" if works else "fp8.kernels=auto"
    raise Unavailable(f"fp8.recipe={recipe} {lacks}; nearest: {nearest}")


def number_format(fp8: Fp8Config) -> str:
    """Of operands: e4m3, or hybrid with E5M2 for gradients."""
    return fp8.format or ("hybrid" if fp8.recipe in ("delayed", "tensorwise") else "e4m3")


def make(fp8: Fp8Config) -> Any:
    """The recipe of the settings. Raises Unavailable as `check`."""
    check(fp8.recipe)
    recipes = importlib.import_module("transformer_engine.common.recipe")
    options: dict[str, Any] = {"fp8_format": getattr(recipes.Format, number_format(fp8).upper())}
    if fp8.recipe == "delayed":
        options |= {"amax_history_len": fp8.amax_history_len, "amax_compute_algo": fp8.amax_compute_algo}
    return getattr(recipes, KINDS[fp8.recipe].class_name)(**options)


def autocast(recipe: Any, group: dist.ProcessGroup | None, *, enabled: bool = True) -> AbstractContextManager[None]:
    """TransformerEngine's autocast.

    Args:
        group: over which delayed scaling reduces the amaxes when the outermost autocast is left.
    """
    pytorch = engine()
    if hasattr(pytorch, "autocast"):
        return pytorch.autocast(enabled=enabled, recipe=recipe, amax_reduction_group=group)
    return pytorch.fp8_autocast(enabled=enabled, fp8_recipe=recipe, fp8_group=group)


def reduced_at_the_end(recipe: Any, group: dist.ProcessGroup | None, *, on: bool) -> AbstractContextManager[None]:
    """Around all layers of a forward pass in training: delayed scaling takes their amaxes into account once, when the
    pass is over. Nothing of another recipe."""
    return autocast(recipe, group) if on and torch.is_grad_enabled() else contextlib.nullcontext()
