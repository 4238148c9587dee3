"""Modules by name, with their type."""

from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def module_dict(modules: Mapping[str, M]) -> Mapping[str, M]:
    """nn.ModuleDict, whose stub says of its values that they are modules, and no more."""
    return cast("Mapping[str, M]", nn.ModuleDict(modules))
