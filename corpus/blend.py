"""The source of each sample of a weighted blend. Legend: K sources, N blocks, M samples of a block.

Samples are taken in blocks of 2^16. A block is divided among the sources by their weights, at edges that move from
block to block, so that a source whose share of a block is below one sample gets its samples too. Within the block the
places of a source are spread evenly: sample j has the place j * 46073 modulo 2^16. No partial quotient of 46073 / 2^16
as a continued fraction is above 2, so that any run of samples has close to its share of every source (Niederreiter
1992, "Random Number Generation and Quasi-Monte Carlo Methods", section 3.1). The place of any sample follows from its
number: nothing is stored but the current block.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_BLOCK = 1 << 16
_STRIDE = 46073
_CHUNK = 1 << 12
"""Blocks that are counted at once."""
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio."""


class Blend:
    """Assigns sample i to a source and numbers the samples of each source. Both depend on the weights and on i only."""

    def __init__(self, weights: list[float]) -> None:
        bounds = np.cumsum(np.array(weights, dtype=np.float64))
        self._edges_K = np.concatenate([[0.0], bounds / bounds[-1]]) * _BLOCK
        self._counted, self._before_K = 0, np.zeros(len(weights), dtype=np.int64)
        """A block, and the samples of each source before it."""
        self._block = -1
        self._source_M = self._rank_M = np.empty(0, dtype=np.int64)
        """Of the current block: the source of each sample, and how many samples of the source are before it."""

    def locate(self, index: int) -> tuple[int, int]:
        """The source of sample `index`, and the sample's index within that source."""
        if len(self._before_K) == 1:
            return 0, index
        block, at = divmod(index, _BLOCK)
        self._open(block)
        source = int(self._source_M[at])
        return source, int(self._before_K[source] + self._rank_M[at])

    def counts(self, samples: int) -> np.ndarray:
        """Number of samples of each source among the first `samples`, int64 [K]."""
        block, at = divmod(samples, _BLOCK)
        self._open(block)
        return self._before_K + np.bincount(self._source_M[:at], minlength=len(self._before_K))

    def _open(self, block: int) -> None:
        if block == self._block:
            return
        if block < self._counted:
            self._counted, self._before_K = 0, np.zeros_like(self._before_K)
        for start in range(self._counted, block, _CHUNK):
            blocks = np.arange(start, min(start + _CHUNK, block), dtype=np.uint64)
            self._before_K = self._before_K + np.diff(self._edges(blocks)).sum(0)
        self._counted = self._block = block
        places_M = np.arange(_BLOCK) * _STRIDE % _BLOCK
        (edges_K,) = self._edges(np.array([block], dtype=np.uint64))
        self._source_M = np.searchsorted(edges_K[1:], places_M, side="right")
        order = np.argsort(self._source_M, kind="stable")
        self._rank_M = np.empty(_BLOCK, dtype=np.int64)
        self._rank_M[order] = np.arange(_BLOCK) - edges_K[self._source_M[order]]

    def _edges(self, blocks_N: np.ndarray) -> np.ndarray:
        """The first place of each source in some blocks, then the end of the block: int64 [N, K + 1]."""
        shift_N = ((blocks_N * np.uint64(_GOLDEN)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        edges = np.ceil(self._edges_K - shift_N[:, None]).astype(np.int64)
        edges[:, 0], edges[:, -1] = 0, _BLOCK
        return np.maximum(edges, 0)


class QuotaBlend:
    """Gives some sources an exact number of the first `samples`, and the others what is left by their weights.

    The places of the first source with a quota are spread evenly over all samples, those of the second over the samples
    that remain, and so on: with q of n places, floor(i q / n + 1/2) of the first i are the source's. So the place of a
    sample again follows from its number.
    """

    def __init__(self, quotas: Sequence[int], weights: list[float], samples: int) -> None:
        """
        Args:
            quotas: of each source; 0 for those with a weight.
            weights: of each source; 0 for those with a quota. If all are 0, the quotas take all samples.
        """
        assert len(quotas) == len(weights) and sum(quotas) <= samples
        self._quotas = [(source, quota) for source, quota in enumerate(quotas) if quota]
        self._rest = Blend(weights) if any(weights) else None
        assert self._rest is not None or sum(quotas) == samples
        self._samples, self._sources = samples, len(quotas)

    def locate(self, index: int) -> tuple[int, int]:
        """As `Blend.locate`."""
        places = self._samples
        for source, quota in self._quotas:
            before = _spread(min(index, places), quota, places)
            if index < places and _spread(index + 1, quota, places) > before:
                return source, before
            index, places = index - before, places - quota
        assert self._rest is not None, "a sample past the end of the run"
        return self._rest.locate(index)

    def counts(self, samples: int) -> np.ndarray:
        """As `Blend.counts`."""
        places, found = self._samples, {}
        for source, quota in self._quotas:
            found[source] = _spread(min(samples, places), quota, places)
            samples, places = samples - found[source], places - quota
        counts_K = np.zeros(self._sources, dtype=np.int64) if self._rest is None else self._rest.counts(samples)
        for source, count in found.items():
            counts_K[source] += count
        return counts_K


def _spread(first: int, quota: int, places: int) -> int:
    """How many of the first places are the source's. The quota is at least 1."""
    return (2 * first * quota + places) // (2 * places)


class AnyBlend(Protocol):
    def locate(self, index: int) -> tuple[int, int]: ...

    def counts(self, samples: int) -> np.ndarray: ...


class StagedBlend:
    """Blends of the same sources, each from a sample on. Every source goes on where the stage before has left it."""

    def __init__(self, stages: Sequence[tuple[int, AnyBlend]]) -> None:
        """
        Args:
            stages: (first sample, blend) of each stage, in order; the first one begins with sample 0.
        """
        self._begins, self._blends = [begin for begin, _ in stages], [blend for _, blend in stages]
        assert self._begins[0] == 0 and self._begins == sorted({*self._begins})
        self._before = [np.zeros_like(self._blends[0].counts(0))]
        for blend, begin, end in zip(self._blends, self._begins, self._begins[1:], strict=False):
            self._before.append(self._before[-1] + blend.counts(end - begin))

    def locate(self, index: int) -> tuple[int, int]:
        """As `Blend.locate`."""
        stage = bisect_right(self._begins, index) - 1
        source, of_stage = self._blends[stage].locate(index - self._begins[stage])
        return source, of_stage + int(self._before[stage][source])

    def counts(self, samples: int) -> np.ndarray:
        """As `Blend.counts`."""
        stage = max(bisect_right(self._begins, samples) - 1, 0)
        return self._before[stage] + self._blends[stage].counts(samples - self._begins[stage])
