"""A configuration that is read by dotted key, the violation of a rule, and helpers to write rules with."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from conf.schema import Config

WORLD_SIZE = "world_size"
"""The key of the number of ranks, which is not a setting."""


@dataclass(frozen=True)
class Violation:
    """A violated rule."""

    rule: str
    """The rule in terms of settings, without values: violations of the same rule have the same text."""
    actual: str
    """The values of this configuration that violate it."""
    suggestions: dict[str, Iterable[Any]] = field(default_factory=dict)
    """Setting -> values that may satisfy the rule, nearest first."""
    unused: bool = False
    """Whether the only problem is that the setting in `suggestions` would have no effect."""


@functools.cache
def _getter(key: str) -> Callable[[Config], Any]:
    return attrgetter(key)


@dataclass(frozen=True)
class ConfigView:
    """A configuration and the number of ranks, read by dotted key."""

    config: Config
    world_size: int

    def __getitem__(self, key: str) -> Any:
        return self.world_size if key == WORLD_SIZE else _getter(key)(self.config)

    def replace(self, key: str, value: Any) -> "ConfigView":
        """A copy with one setting, or the number of ranks, changed."""
        if key == WORLD_SIZE:
            return ConfigView(self.config, value)
        return ConfigView(_replace(self.config, key, value), self.world_size)

    def product(self, *keys: str) -> int:
        """The product of settings; those that are null or 0 count as 1."""
        return math.prod(self[key] or 1 for key in keys)


DEFAULTS = ConfigView(Config(), 1)


def _replace(section: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    return dataclasses.replace(section, **{head: _replace(getattr(section, head), rest, value) if rest else value})


def format_value(value: Any) -> str:
    """A value in the syntax of an override."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def multiples(value: int, of: int) -> list[int]:
    """Some positive multiples of a number, nearest to value first."""
    middle = max(1, round(value / of))
    return sorted((of * k for k in range(max(1, middle - 32), middle + 33)), key=lambda m: abs(m - value))


def divisors(value: int, of: int) -> list[int]:
    """The divisors of a number, nearest to value first."""
    small = [k for k in range(1, math.isqrt(of) + 1) if of % k == 0]
    return sorted({*small, *(of // k for k in small)}, key=lambda d: abs(d - value))


def divisible(cfg: ConfigView, number: str, *by: str) -> Iterator[Violation]:
    """The rule number % (product of by) == 0. Settings in `by` that are null are ignored."""
    by = tuple(key for key in by if cfg[key] is not None)
    product = cfg.product(*by)
    if cfg[number] % product == 0:
        return
    terms = " * ".join(by)
    suggestions = {key: divisors(cfg[key], cfg[number]) for key in by if cfg[key] > 1}
    yield Violation(
        f"{number} % {f'({terms})' if len(by) > 1 else terms} == 0",
        f"{cfg[number]} % {product} = {cfg[number] % product}",
        suggestions | {number: multiples(cfg[number], product)},
    )
