"""A configuration as the rules see it, a rule that it violates, and what the rules are written with."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from conf.schema import Config

WORLD_SIZE = "world_size"
"""A key beside the settings: the number of ranks."""


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold."""

    rule: str
    """The equation, without numbers: two violations of one rule have the same text."""
    numbers: str
    """What the equation says of this configuration."""
    repairs: dict[str, Iterable[Any]] = field(default_factory=dict)
    """Values that may mend it, per setting, nearest first."""
    idle: bool = False
    """Whether all that is wrong is that the one setting of `repairs` would have no effect."""


@dataclass(frozen=True)
class Case:
    """A configuration and the number of ranks, read by dotted key."""

    config: Config
    world_size: int

    def __getitem__(self, key: str) -> Any:
        return self.world_size if key == WORLD_SIZE else attrgetter(key)(self.config)

    def replaced(self, key: str, value: Any) -> "Case":
        """The same case with one setting (or the number of ranks) changed."""
        if key == WORLD_SIZE:
            return Case(self.config, value)
        return Case(_replaced(self.config, key, value), self.world_size)

    def product(self, *keys: str) -> int:
        return math.prod(self[key] or 1 for key in keys)


DEFAULTS = Case(Config(), 1)


def _replaced(section: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    return dataclasses.replace(section, **{head: _replaced(getattr(section, head), rest, value) if rest else value})


def shown(value: Any) -> str:
    """A value as it is written in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
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


def divisible(case: Case, number: str, *by: str) -> Iterator[Violation]:
    """number % (product of by) == 0"""
    by = tuple(key for key in by if case[key] is not None)
    product = case.product(*by)
    if case[number] % product == 0:
        return
    terms = " * ".join(by)
    repairs = {key: divisors(case[key], case[number]) for key in by if case[key] > 1}
    yield Violation(
        f"{number} % {f'({terms})' if len(by) > 1 else terms} == 0",
        f"{case[number]} % {product} = {case[number] % product}",
        repairs | {number: multiples(case[number], product)},
    )
