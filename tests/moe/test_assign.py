"""Choices that are balanced when they are made, against cases drawn by hand, loops and Megatron-Core's plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.assign import expert_choice, sinkhorn_potentials
from tests.moe import reference
from tests.moe.helpers import random


def test_experts_take_their_best_tokens() -> None:
    """Drawn by hand, two tokens for each of three experts. Token 2 is wanted by all, token 0 by nobody; experts 1 and
    2 have two tokens each that are equal for them, and take the earlier one."""
    scores_ME = torch.tensor([[0.1, 0.1, 0.1], [0.2, 0.3, 0.5], [0.9, 0.9, 0.9], [0.3, 0.3, 0.5]])
    assert expert_choice(scores_ME, 2).tolist() == [[3, 3, 3], [1, 2, 3], [0, 1, 2], [0, 3, 3]]
    assert expert_choice(scores_ME, 1).tolist() == [[3, 3, 3], [3, 3, 3], [0, 1, 2], [3, 3, 3]]


def test_experts_take_no_padding() -> None:
    scores_ME = torch.tensor([[0.1, 0.2], [0.9, 0.9], [0.3, 0.1]])
    padding_M = torch.tensor([False, True, False])
    assert expert_choice(scores_ME, 1, padding_M).tolist() == [[1], [2], [0]]
    assert expert_choice(scores_ME, 0, torch.ones(3, dtype=torch.bool)).tolist() == [[2], [2], [2]]
    assert expert_choice(torch.empty(0, 2), 0).shape == (0, 1)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_taken_tokens_equal_the_reference(tokens: int, experts: int, limit: int, seed: int) -> None:
    """Scores of only a few values, so that many are equal."""
    scores_ME, limit = random(tokens, experts, seed=seed).round(), min(limit, tokens)
    chosen = [[e for e in row if e < experts] for row in expert_choice(scores_ME, limit).tolist()]
    assert chosen == reference.taken_by_experts(scores_ME, limit)
    assert all(sum(e in row for row in chosen) == limit for e in range(experts))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_plan_gives_tokens_and_experts_equal_shares(scale: float) -> None:
    """Logits that favour some experts by far."""
    logits_ME = scale * (random(96, 6) + 3 * random(6, seed=1))
    plan_ME = (logits_ME.double() + sinkhorn_potentials(logits_ME)).softmax(1) / 96
    assert torch.allclose(plan_ME.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-3)
    torch.testing.assert_close(plan_ME, reference.transport_plan(logits_ME.double()), rtol=1e-3, atol=1e-9)


def test_the_plan_is_megatron_cores(runtime) -> None:
    from megatron.core.transformer.moe.moe_utils import sinkhorn

    logits_ME = 0.5 * random(64, 8)
    theirs = sinkhorn(logits_ME.to(runtime.device)).cpu()
    ours = (logits_ME.double() + sinkhorn_potentials(logits_ME)).softmax(1) / 64
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-3, atol=0)
    assert torch.equal(theirs.argmax(1), ours.argmax(1))


def test_a_collapsed_router_is_spread_by_the_plan() -> None:
    """All tokens prefer expert 0, most of them by far; each expert gets those that mind it least."""
    logits_ME = torch.tensor([[4.0, 0.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    balanced_ME = logits_ME + sinkhorn_potentials(logits_ME)
    assert logits_ME.argmax(1).tolist() == [0, 0, 0, 0] and balanced_ME.argmax(1).tolist() == [0, 1, 0, 1]


def test_padding_and_extreme_logits_leave_the_plan_finite() -> None:
    logits_ME = torch.cat([random(6, 3), torch.full((2, 3), 1e30), 1e4 * random(4, 3, seed=1)])
    padding_M = torch.tensor(6 * [False] + 2 * [True] + 4 * [False])
    with_padding = sinkhorn_potentials(logits_ME, padding_M)
    assert with_padding.isfinite().all()
    torch.testing.assert_close(with_padding, sinkhorn_potentials(logits_ME[~padding_M]))
    assert sinkhorn_potentials(torch.zeros(0, 3)).isfinite().all()
