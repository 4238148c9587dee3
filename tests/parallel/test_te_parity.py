"""Every layout is the same model with TransformerEngine's layers too (tests.stand_ins.parity has more cells), and so is
a checkpoint."""

import pytest
import torch

from benchmarks.parity import LIMIT, Layouts
from parallel.local_launcher import RankPool
from tests.stand_ins.parity import MATRIX, cells, checkpoint_cell, deviation

TESTED = [layouts for layouts in MATRIX if layouts.tested]


@pytest.mark.parametrize("layouts", TESTED, ids=lambda layouts: f"{layouts.name}, {layouts.tested}")
def test_a_layout_is_the_same_model(ranks: RankPool, layouts: Layouts) -> None:
    for name, found in cells(ranks, layouts, layouts.tested.split()):
        assert max(found.values()) <= LIMIT, (name, {k: v for k, v in found.items() if v > LIMIT})


@pytest.mark.parametrize("first", [True, False], ids=["written with it", "continued with it"])
def test_checkpoints_are_the_same_with_and_without_it(ranks: RankPool, first: bool) -> None:
    """Under tp2 with sequence parallelism, and on one rank without it."""
    (layouts,) = (layouts for layouts in MATRIX if layouts.name == "tp2 +sequence")
    assert checkpoint_cell(ranks, layouts, first=first) <= LIMIT


def test_the_comparison_of_checkpoints_can_fail() -> None:
    one = [(1.0, 2.0)], {"weights": {"a": torch.ones(2)}}
    assert deviation(one, one) == 0
    assert deviation(([(1.0, 2.1)], one[1]), one) > LIMIT
    for other in ({"weights": {"b": torch.ones(2)}}, {"weights": {"a": torch.ones(2) + 1e-3}}, {}):
        assert deviation((one[0], other), one) == float("inf")
