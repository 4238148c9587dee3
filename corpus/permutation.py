"""A keyed permutation of the numbers 0 to n - 1 that is computed instead of stored. Legend: N numbers."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_ROUNDS = 8
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)
"""Odd multipliers of SplitMix64 (Steele, Lea and Flood 2014)."""
_MASK = (1 << 64) - 1
_FEW = 32
"""Numbers up to which Python's integers are faster than arrays."""
Number = TypeVar("Number", int, np.ndarray)
"""An integer below 2^64, or uint64 [N]."""


class Permutation:
    """A Feistel network on pairs (left, right) with addition modulo the two sizes, whose product is n or a little more,
    and cycle walking: a result past n is permuted again (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", sections 3 and 5). It takes the same memory for every n, and any part of it can be computed by itself."""

    def __init__(self, size: int, key: Sequence[int]) -> None:
        """
        Args:
            size: n, from 1 to 2^62.
            key: integers >= 0 that select the permutation.
        """
        assert 0 < size <= 1 << 62
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)  # fewer than `left` pairs are past n
        self._keys = [int(word) for word in np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)]

    def images(self, first: int, end: int) -> np.ndarray:
        """The images of the numbers from `first` to before `end`, int64."""
        if end - first <= _FEW:
            return np.array([self._image(number) for number in range(first, end)], dtype=np.int64)
        values_N = self._network(np.arange(first, end, dtype=np.uint64))
        outside = np.flatnonzero(values_N >= self.size)
        while len(outside):
            values_N[outside] = self._network(values_N[outside])
            outside = outside[values_N[outside] >= self.size]
        return values_N.astype(np.int64)

    def _image(self, number: int) -> int:
        while (number := self._network(number)) >= self.size:
            pass
        return number

    def _network(self, number: Number) -> Number:
        """One pass over numbers below left * right."""
        left, right = number // self._right, number % self._right
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = _add(right, left, key, self._right)
            else:
                left = _add(left, right, key, self._left)
        return left * self._right + right


def _add(half: Number, other: Number, key: int, size: int) -> Number:
    """half + hash(key, other) modulo size, which is below 2^32."""
    mixed = (other + key) * _MIX[0] & _MASK
    mixed = (mixed ^ mixed >> 32) * _MIX[1] & _MASK
    return (half + ((mixed >> 32) * size >> 32)) % size
