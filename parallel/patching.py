"""Replacing attributes of foreign modules and classes, and hiding packages from them. parallel/megatron_compat.py says
which."""

import contextlib
import pkgutil
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

Saved = list[tuple[object, str, object]]
"""(owner, name, original)"""


@dataclass(frozen=True)
class Patch:
    """A replacement of attributes of a module or class."""

    owner: str
    names: tuple[str, ...]
    replace: Callable[[Any], Any]
    """Original -> replacement; called for each name."""
    why: str

    def apply(self) -> Saved:
        """Installs the patch. Returns (owner, name, original) of each attribute."""
        owner = pkgutil.resolve_name(self.owner)
        saved = [(owner, name, getattr(owner, name)) for name in self.names]
        for _, name, original in saved:
            setattr(owner, name, self.replace(original))
        return saved


def restore(saved: Saved) -> None:
    for owner, name, original in reversed(saved):
        setattr(owner, name, original)


@contextlib.contextmanager
def patched(*patches: Patch) -> Generator[None]:
    saved: Saved = []
    try:
        for patch in patches:
            saved += patch.apply()
        yield
    finally:
        restore(saved)


@contextlib.contextmanager
def absent(*packages: str) -> Generator[None]:
    """Inside, importing the packages raises ModuleNotFoundError; afterwards what was loaded of them is there again."""
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    for name in (*loaded, *packages):
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for name in (*loaded, *packages):
            sys.modules.pop(name, None)
        sys.modules.update(loaded)
