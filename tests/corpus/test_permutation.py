"""Keyed permutations: each number once, whatever n and key; and no visible pattern."""

import math

import numpy as np
import pytest

from corpus import permutation
from corpus.permutation import Permutation


def is_bijection(size: int, key: list[int]) -> bool:
    images = Permutation(size, key).images(0, size)
    return images.dtype == np.int64 and np.array_equal(np.sort(images), np.arange(size))


def test_every_small_size_is_permuted() -> None:
    assert all(is_bijection(size, [seed]) for size in range(1, 300) for seed in range(2))


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 999_983, 1000 * 1000, 1000 * 1001 + 1])
def test_larger_sizes_are_permuted(size: int) -> None:
    assert is_bijection(size, [7, size])


@pytest.mark.parametrize("size", [10**9, 10**12 + 39, 1 << 62])
def test_a_part_of_a_huge_permutation(size: int) -> None:
    """Distinct numbers of the range, and the same ones a few at a time."""
    permute = Permutation(size, [3])
    images = np.concatenate([permute.images(0, 50_000), permute.images(size - 50_000, size)])
    assert len(np.unique(images)) == 100_000 and images.min() >= 0 and images.max() < size
    assert permute.images(5, 5 + permutation._FEW).tolist() == images[5 : 5 + permutation._FEW].tolist()
    assert permute.images(size - 1, size).tolist() == images[-1:].tolist() and len(permute.images(7, 7)) == 0


def test_sizes_past_which_values_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five numbers are permuted among six pairs: some value is outside at first, with arrays and without."""
    passes = []
    network = Permutation._network
    monkeypatch.setattr(Permutation, "_network", lambda self, x: passes.append(x) or network(self, x))
    few = [Permutation(5, [seed]).images(0, 5).tolist() for seed in range(20)]
    assert len(passes) > 5 * 20
    monkeypatch.setattr(permutation, "_FEW", 0)
    passes.clear()
    assert [Permutation(5, [seed]).images(0, 5).tolist() for seed in range(20)] == few
    assert len(passes) > 20


def chi_square(observed: np.ndarray) -> float:
    """Standard deviations by which the statistic of equally likely cells exceeds its mean."""
    expected, free = observed.sum() / observed.size, observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


def test_positions_look_uniform_over_keys() -> None:
    size, keys = 31, 4000
    images = np.array([Permutation(size, [5, key]).images(0, size) for key in range(keys)])
    cells = np.zeros((size, size))
    for position in range(size):
        cells[position] = np.bincount(images[:, position], minlength=size)
    assert abs(chi_square(cells)) < 5
    pairs = images[:, 0] * size + images[:, 1]  # neighbours
    counts = np.bincount(pairs, minlength=size * size).reshape(size, size)
    assert not counts.diagonal().any()
    assert abs(chi_square(counts[~np.eye(size, dtype=bool)])) < 5


def test_a_large_permutation_looks_uniform() -> None:
    size, bins = 1_000_003, 256
    images = Permutation(size, [1]).images(0, 200_000)
    assert abs(chi_square(np.bincount(images * bins // size, minlength=bins))) < 5
    steps = np.diff(images) % size
    assert abs(chi_square(np.bincount(steps * bins // size, minlength=bins))) < 5
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.01


def test_too_few_rounds_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the statistics above can fail."""
    monkeypatch.setattr(permutation, "_ROUNDS", 2)
    with pytest.raises(AssertionError):
        test_a_large_permutation_looks_uniform()
