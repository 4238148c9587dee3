"""Best-fit packing, against one item after the other."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corpus.packing import best_fit


def one_by_one(places: list[int], size: int) -> list[list[int]]:
    """The bins that packing item by item makes: of equally full bins the one that became so last. Runs that resume
    were promised these."""
    bins: list[list[int]] = []
    changed: list[int] = []
    for time, item in enumerate(sorted(range(len(places)), key=lambda i: -places[i])):
        room = [size - sum(places[i] for i in b) for b in bins]
        fitting = [number for number in range(len(bins)) if room[number] >= places[item]]
        if not fitting:
            bins.append([])
            changed.append(0)
        best = min(fitting, key=lambda number: (room[number], -changed[number])) if fitting else len(bins) - 1
        bins[best].append(item)
        changed[best] = time
    return bins


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.sampled_from([50, 64]))
def test_best_fit_decreasing(places: list[int], size: int) -> None:
    got = [pack.tolist() for pack in best_fit(np.array(places), size)]
    assert sorted(i for pack in got for i in pack) == list(range(len(places)))
    assert got == one_by_one(places, size)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=120))
def test_many_equal_items(places: list[int]) -> None:
    assert [pack.tolist() for pack in best_fit(np.array(places), 16)] == one_by_one(places, 16)
