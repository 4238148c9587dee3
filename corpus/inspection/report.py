"""What an inspection finds: documents, their lengths, samples, and what is wrong with them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_NAMED = 3

Progress = Callable[[str, float], None]
"""Called with the current activity and the fraction of it that is done."""


@dataclass
class Problems:
    """What is wrong, counted by kind, with the places of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str, count: int = 1) -> None:
        self.counts[kind] += count
        places = self.places.setdefault(kind, [])
        if len(places) < _NAMED:
            places.append(place)

    def lines(self) -> list[str]:
        """`2 x KIND: PLACE; PLACE`."""
        found = []
        for kind, count in self.counts.most_common():
            places = self.places[kind]
            more = f"; and {count - len(places):,} more" if count > len(places) else ""
            found.append(f"{count:,} x {kind}: {'; '.join(places)}{more}")
        return found


@dataclass
class Report:
    facts: list[tuple[str, str]]
    """(what, value), such as the number of documents."""
    lengths: np.ndarray
    """Of each document that was read, int64."""
    unit: str
    """Of the lengths: tokens or characters."""
    samples: list[tuple[str, str]]
    """(where, text) of some documents."""
    problems: Problems
    part: str | None
    """What was read of the data. None: all of it."""


def size_text(count: float) -> str:
    """`1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
