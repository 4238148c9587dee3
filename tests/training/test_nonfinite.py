"""Updates that are left out."""

import pytest

from training.errors import RunFailed
from training.nonfinite import SkipCounter


def test_skipped_updates_are_counted_in_a_row() -> None:
    counter = SkipCounter(limit=2)
    assert counter.skipped(4, []).startswith("step 4: update skipped, not finite: loss (1 in a row, 2 allowed)")
    counter.applied()
    counter.skipped(6, ["gradient of a"])
    assert "gradient of a (2 in a row" in counter.skipped(7, ["gradient of a"])
    with pytest.raises(RunFailed, match="step 8"):
        counter.skipped(8, [])
    assert counter.total == 4
