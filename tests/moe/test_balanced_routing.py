"""Choices that are balanced when they are made, against cases drawn by hand, loops and Megatron-Core's plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.balanced_routing import TIE, WIDEST_TIE, expert_choice, plan_ranks, sinkhorn_potentials, tie_ranks
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


def test_scores_equal_but_for_rounding_share_a_rank_wherever_they_lie() -> None:
    """Pairs at 4,000 places: a grid would have an edge between some of them."""
    base_N = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    nudged_N3 = base_N[:, None] * (1 + 2.0**-22 * torch.tensor([0.0, 1.0, -1.0]))
    scores_NX = torch.cat([nudged_N3, (1.1 * base_N)[:, None], (0.9 * base_N)[:, None]], dim=1)
    assert tie_ranks(scores_NX).tolist() == [[1, 1, 1, 0, 2]] * 4000
    assert tie_ranks(torch.tensor([[0.5, -torch.inf, 0.0, -torch.inf, 0.0]])).tolist() == [[0, 2, 1, 2, 1]]


def test_ranks_keep_groups_apart_and_divide_long_chains() -> None:
    ranks = tie_ranks(torch.tensor([[0.5, 0.5, 0.7, 0.5, 0.9]]), torch.tensor([[1, 0, 0, 1, 1]]))
    assert ranks.tolist() == [[3, 1, 0, 3, 2]]
    chain = 1 - TIE / 2 * torch.arange(1000, dtype=torch.float64)
    rank = tie_ranks(chain[None])[0]
    assert rank.tolist() == ((1 - chain) / WIDEST_TIE).long().tolist() and 0 < rank[-1] < 10


def test_experts_and_plans_choose_among_equals_by_position_whatever_the_rounding() -> None:
    noise = 1 + 2.0**-22 * random(64, 3, seed=3).clamp(-1, 1)
    scores_ME = torch.full((64, 3), 0.3) * noise
    assert expert_choice(scores_ME, 5).tolist() == [[0, 1, 2]] * 5 + [[3, 3, 3]] * 59
    logits_TE = scores_ME.log().double()
    assert plan_ranks(logits_TE).unique().tolist() == [0]
    masked = plan_ranks(logits_TE.masked_fill(torch.tensor([True, False, False]), -torch.inf))
    assert masked.tolist() == [[1, 0, 0]] * 64
