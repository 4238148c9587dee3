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
    module, owner, attribute = _parts(name)
    found = importlib.import_module(module)
    if owner:
        return getattr(found, owner), attribute
    return (getattr(found, attribute), "__init__") if attribute[0].isupper() else (found, attribute)


def _parts(name: str) -> tuple[str, str, str]:
    """(module, class or "", attribute)."""
    above, _, attribute = name.rpartition(".")
    module, _, owner = above.rpartition(".")
    return (module, owner, attribute) if owner[0].isupper() else (above, "", attribute)


def parameters_of(stand_in: Any, attribute: str) -> list[inspect.Parameter]:
    """Without self."""
    listed = list(inspect.signature(getattr(stand_in, attribute)).parameters.values())
    return listed[1:] if isinstance(stand_in, type) else listed


@contextmanager
def as_version(package: str, version: str) -> Iterator[set[str]]:
    """Inside `installed(package)`: each function takes what that version takes, and raises TypeError for what it would
    not; what it lacks is not there. Yields the names that have been called so far.

    Args:
        package: a key of the table.
    """
    saved: list[tuple[Any, str, Any]] = []
    called: set[str] = set()
    added: list[str] = []
    entries = {n: v for n, v in table()[package][version].items() if v != "native" and not n.endswith(" attributes")}
    for name, listed in entries.items():
        if listed is None:
            continue
        try:
            owner, attribute = find(name)
        except ImportError:  # an earlier version has a function that the newest, and so the stand-in, lacks
            module, _, attribute = name.rpartition(".")
            owner = sys.modules.setdefault(module, ModuleType(module))
            added.append(module)
            setattr(owner, attribute, lambda: None)
        original, method = getattr(owner, attribute), isinstance(owner, type)
        saved.append((owner, attribute, original))
        if isinstance(inspect.getattr_static(owner, attribute), classmethod | staticmethod):
            setattr(owner, attribute, staticmethod(_bound(name, original, as_signature(listed), called, False)))
        else:
            setattr(owner, attribute, _bound(name, original, as_signature(listed), called, method))
    modules = {name: _parts(name)[0] for name in entries}
    there = {modules[name] for name, listed in entries.items() if listed is not None}
    lacking = [name for name, listed in entries.items() if listed is None]
    hidden = {m: sys.modules.get(m) for m in {modules[name] for name in lacking} - there}
    for name in lacking:
        owner, attribute = sys.modules.get(modules[name]), name.rpartition(".")[2]
        if modules[name] in there and hasattr(owner, attribute):
            saved.append((owner, attribute, getattr(owner, attribute)))
            delattr(owner, attribute)
    for module in hidden:  # None: no such module
        sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield called
    finally:
        _restore(hidden)
        for owner, attribute, original in reversed(saved):
            setattr(owner, attribute, original)
        for module in added:
            sys.modules.pop(module, None)


def _restore(hidden: dict[str, ModuleType | None]) -> None:
    for name, module in hidden.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


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
