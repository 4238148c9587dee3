"""The stand-ins as a recorded version of a package has its functions."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tests.stand_ins.signatures import as_signature, table


def find(name: str) -> tuple[Any, str]:
    """(module or class, attribute) of a name in the table; a class stands for its __init__."""
    module, _, attribute = name.rpartition(".")
    if attribute[0].islower() and module.rpartition(".")[2][0].isupper():
        module, _, owner = module.rpartition(".")
        return getattr(importlib.import_module(module), owner), attribute
    found = importlib.import_module(module)
    return (getattr(found, attribute), "__init__") if attribute[0].isupper() else (found, attribute)


def parameters_of(stand_in: Any, attribute: str) -> list[inspect.Parameter]:
    """Without self."""
    listed = list(inspect.signature(getattr(stand_in, attribute)).parameters.values())
    return listed[1:] if isinstance(stand_in, type) else listed


@contextmanager
def as_version(package: str, version: str) -> Iterator[set[str]]:
    """Inside `installed(package)`: each function takes what that version takes, and raises TypeError for what it would
    not. Yields the names that have been called so far."""
    saved: list[tuple[Any, str, Any]] = []
    called: set[str] = set()
    added: list[str] = []
    for name, listed in table()[package][version].items():
        if listed is None or listed == "native" or name.endswith(" attributes"):
            continue
        try:
            owner, attribute = find(name)
        except ImportError:  # an earlier version has a function that the newest, and so the stand-in, lacks
            module, _, attribute = name.rpartition(".")
            owner = sys.modules.setdefault(module, ModuleType(module))
            added.append(module)
            setattr(owner, attribute, lambda: None)
        original = getattr(owner, attribute)
        saved.append((owner, attribute, original))
        setattr(owner, attribute, _bound(name, original, as_signature(listed), called, isinstance(owner, type)))
    try:
        yield called
    finally:
        for owner, attribute, original in reversed(saved):
            setattr(owner, attribute, original)
        for module in added:
            sys.modules.pop(module, None)


def _bound(
    name: str, original: Callable[..., Any], signature: inspect.Signature, called: set[str], method: bool
) -> Callable[..., Any]:
    own = inspect.signature(original).parameters
    if method:
        self_first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = signature.replace(parameters=[self_first, *signature.parameters.values()])

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        given = dict(signature.bind(*args, **kwargs).arguments)
        further = given.pop("kwargs", {})
        missing = {p.name: None for p in own.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        return original(**{**missing, **{k: v for k, v in given.items() if k in own}, **further})

    call.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return call
