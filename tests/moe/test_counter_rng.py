"""The hash against the same formulas on Python's unbounded integers, and what makes it usable as noise."""

import pytest
import torch

from moe.counter_rng import key, uniform

MASK64, MASK32 = (1 << 64) - 1, (1 << 32) - 1


def by_hand(key: int, row: int, column: int) -> float:
    """splitmix64's finalizer of the row, then lowbias32 along it."""
    z = (row + key) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    x = ((z ^ (z >> 31)) ^ (column * 0x9E3779B9)) & MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return ((x ^ (x >> 16)) >> 8) / 2**24


@pytest.mark.parametrize("name", [key(1, "jitter", 7), key(0), (1 << 62) - 1, 0])
def test_equals_the_formula(name: int) -> None:
    rows_R = torch.tensor([0, 1, 5, 2**31, 2**40])
    wanted = [[by_hand(name, row, column) for column in range(5)] for row in rows_R.tolist()]
    assert uniform(name, rows_R, 5).tolist() == wanted


def test_a_row_has_its_numbers_whoever_asks() -> None:
    whole = uniform(3, torch.arange(10), 4)
    assert torch.equal(torch.cat([uniform(3, torch.arange(4), 4), uniform(3, torch.arange(4, 10), 4)]), whole)


def test_every_part_of_a_key_counts() -> None:
    keys = {key(*parts) for parts in ((1, 2), (2, 1), (12,), (1, 2, 0), ("1", 2), (1, "drop", 2))}
    assert len(keys) == 6 and all(0 <= k < 1 << 62 for k in keys)


def test_looks_uniform_and_independent() -> None:
    """A million numbers: mean and variance within five standard errors, all 256 first bytes equally frequent (chi
    square of 255 degrees of freedom within five deviations), neighbours along either axis and under another key
    uncorrelated."""
    u = uniform(key(1234, "jitter", 1, 0, 3), torch.arange(4096), 256).double()
    count = u.numel()
    assert (u >= 0).all() and (u < 1).all()
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    cells = torch.bincount((u * 256).long().flatten(), minlength=256).double()
    chi_square = ((cells - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
    other = uniform(key(1234, "jitter", 1, 0, 4), torch.arange(4096), 256).double()
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, other)):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / a.numel() ** 0.5
