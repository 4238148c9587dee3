"""The whole parity matrix with ranks that share one GPU."""

import pytest
import torch

from benchmarks import parity
from benchmarks.parity import LIMIT, MATRIX, VARIANTS, Outcome, agreement, deviations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Outcome]:
    return parity.one_rank(ranks, VARIANTS)


@pytest.mark.parametrize("layouts", MATRIX, ids=lambda layouts: layouts.name)
def test_a_layout_is_the_same_model(ranks, one_rank, layouts):
    for name, every in parity.cells(ranks, layouts, layouts.variants):
        told = deviations(every[0], one_rank[name])
        assert max(told.values()) <= LIMIT, (name, {what: value for what, value in told.items() if value > LIMIT})
        assert agreement(every) == 0


def test_the_comparison_can_fail(ranks, one_rank):
    assert parity.control(ranks, one_rank["drops"]) > 1e-3
