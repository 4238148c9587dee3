"""Parameters that training leaves as they are (optim.frozen)."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from parallel.sharding import logical_name


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that are frozen: those that a pattern of fnmatch matches, the last matching pattern deciding, where
    "!pattern" makes parameters trainable again.

    Args:
        names: all parameters with a gradient, by logical name.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    names, frozen = list(names), set[str]()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern.removeprefix("!"))
        if not matched:
            examples = ", ".join(sorted({_any_layer(name) for name in names})[:12])
            raise ValueError(f"optim.frozen: {pattern} matches no parameter; there are {examples}, ...")
        frozen = frozen - set(matched) if pattern.startswith("!") else frozen | set(matched)
    if names and len(frozen) == len(names):
        raise ValueError("optim.frozen matches every parameter; exempt some, such as '!*.router.*'")
    return frozen


def _any_layer(name: str) -> str:
    parts = name.split(".")
    return ".".join([parts[0], "*", *parts[2:]] if parts[0] == "layers" else parts)


def freeze(modules: Sequence[nn.Module], is_frozen: Callable[[str], bool]) -> None:
    """Parameters of these logical names get no gradient. To be called before gradient buckets are made."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if is_frozen(logical_name(name, parameter)):
                parameter.requires_grad = False
