"""Which source each sample of a blend comes from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import blend
from corpus.blend import Blend, QuotaBlend, StagedBlend

weights = st.lists(st.integers(1, 20), min_size=2, max_size=5).map(lambda w: [x / sum(w) for x in w])


@settings(max_examples=30, deadline=None)
@given(weights=weights)
def test_shares_are_kept_throughout_and_samples_numbered_in_order(weights: list[float]) -> None:
    assigned, counts = Blend(weights), [0] * len(weights)
    for index in range(1000):
        source, of_source = assigned.locate(index)
        assert of_source == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight * (index + 1)) < 4
    assert Blend(weights).counts(1000).tolist() == counts


def test_any_sample_by_itself_in_any_order() -> None:
    """Across blocks, forward and back."""
    shares = [0.7, 0.2, 0.1]
    one = Blend(shares)
    expected = {i: one.locate(i) for i in range(3 * (1 << 16))}
    other = Blend(shares)
    for i in [150_000, 3, 65_536, 65_535, 131_072, 196_607, 0]:
        assert other.locate(i) == expected[i]
    for source in range(3):
        numbers = [n for s, n in expected.values() if s == source]
        assert numbers == list(range(len(numbers)))


def test_a_source_below_one_sample_of_a_block_gets_its_share() -> None:
    rare, blocks = 1e-6, 2000
    counts = Blend([rare, 1 - rare]).counts(blocks << 16)
    assert counts.sum() == blocks << 16
    assert abs(counts[0] - rare * (blocks << 16)) < 4


def test_a_jump_is_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Blend([0.5, 0.3, 0.2]).counts(100 << 16)
    monkeypatch.setattr(blend, "_CHUNK", 7)
    assert np.array_equal(Blend([0.5, 0.3, 0.2]).counts(100 << 16), whole)


def staged_blend(stages: list[tuple[int, list[float]]]) -> StagedBlend:
    return StagedBlend([(begin, Blend(weights)) for begin, weights in stages])


def test_stages_change_the_weights_and_go_on_in_each_source() -> None:
    stages = [(0, [0.5, 0.5, 0.0]), (1000, [0.0, 0.2, 0.8]), (70_000, [1.0, 0.0, 0.0])]
    staged, counts = staged_blend(stages), [0, 0, 0]
    for index in range(70_100):
        source, of_source = staged.locate(index)
        assert of_source == counts[source], index
        counts[source] += 1
        if index + 1 in (1, 999, 1000, 1001, 69_999, 70_000, 70_001, 70_100):
            assert staged.counts(index + 1).tolist() == counts
    assert counts == pytest.approx([500 + 100, 500 + 0.2 * 69_000, 0.8 * 69_000], abs=4)
    # A stage that is added later changes nothing before it.
    fewer = staged_blend(stages[:1])
    assert all(fewer.locate(i) == staged.locate(i) for i in range(1000))


@settings(max_examples=40, deadline=None)
@given(
    quotas=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any),
    left=st.integers(0, 200),
    weights=st.lists(st.integers(1, 9), max_size=2),
)
def test_quotas_are_kept_exactly_and_spread_evenly(quotas: list[int], left: int, weights: list[int]) -> None:
    left *= bool(weights)
    samples, sources = sum(quotas) + left, len(quotas) + len(weights)
    assigned = QuotaBlend(quotas + [0] * len(weights), [0.0] * len(quotas) + [float(w) for w in weights], samples)
    counts = [0] * sources
    for index in range(samples):
        source, of_source = assigned.locate(index)
        assert of_source == counts[source]
        counts[source] += 1
        assert assigned.counts(index + 1).tolist() == counts
        for count, quota in zip(counts, quotas, strict=False):
            assert abs(count - quota * (index + 1) / samples) < sources + 1
    assert counts[: len(quotas)] == quotas and sum(counts[len(quotas) :]) == left
    if weights:  # past the quotas the others go on
        source, of_source = assigned.locate(samples)
        assert source >= len(quotas) and of_source == counts[source]
