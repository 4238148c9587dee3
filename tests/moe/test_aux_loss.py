"""The auxiliary losses and the capacity, alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.aux_loss import AttachLoss, load_balancing_loss
from moe.capacity import capacity, within_capacity
from ops.routing import RouterStats, count_loads
from tests.moe import reference
from tests.moe.helpers import random


def balancing_loss(probs_TE: Tensor, experts_MK: Tensor, sequences: int = 1) -> Tensor:
    """This rank's part, where no token is padding."""
    loads = count_loads(experts_MK, probs_TE.shape[1], sequences)
    sums_BE = RouterStats.of(probs_TE, probs_TE, experts_MK, sequences=sequences).probs_BE
    return load_balancing_loss(sums_BE, loads, torch.full((sequences,), len(experts_MK) // sequences))


def z_sum(logits_TE: Tensor) -> Tensor:
    return RouterStats.of(logits_TE, logits_TE.softmax(1), torch.zeros(len(logits_TE), 1, dtype=torch.int64)).z


def test_balancing_loss_uses_one_softmax() -> None:
    """Drawn by hand: three tokens, two experts, choices (0, 0, 1), probabilities of expert 0 of 0.9, 0.6, 0.2. A
    second softmax over these would flatten them, to 0.69, 0.55 and 0.35 here."""
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    loss = balancing_loss(probs_TE, torch.tensor([[0], [0], [1]]))
    assert loss.item() == pytest.approx(2 * (2 / 3 * (0.9 + 0.6 + 0.2) / 3 + 1 / 3 * (0.1 + 0.4 + 0.8) / 3))


def test_balancing_loss_of_a_collapsed_router_is_the_number_of_experts() -> None:
    """The value that a second softmax hides: it would say 4e / (e + 3) = 1.9."""
    logits_TE = torch.tensor([[1000.0, 0, 0, 0]]).repeat(6, 1)
    assert balancing_loss(logits_TE.softmax(-1), torch.zeros(6, 1, dtype=torch.int64)) == 4


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_losses_equal_the_reference_and_add_up_over_ranks(tokens: int, experts: int, top_k: int, seed: int) -> None:
    logits_TE = random(tokens, experts, seed=seed).double() * 3
    probs_TE = logits_TE.softmax(-1)
    chosen = [reference.choose(p, min(top_k, experts)) for p in probs_TE]
    experts_MK = torch.tensor(chosen)
    aux, z = reference.balancing_loss(probs_TE, chosen), reference.z_loss(logits_TE)
    assert balancing_loss(probs_TE, experts_MK).item() == pytest.approx(aux.item(), rel=1e-12)
    assert (z_sum(logits_TE) / tokens).item() == pytest.approx(z.item(), rel=1e-12)
    # A rank that holds part of the micro-batch gives its part of the loss.
    halves = probs_TE.split(math.ceil(tokens / 2)), logits_TE.split(math.ceil(tokens / 2))
    parts = [(balancing_loss(p, experts_MK), z_sum(g) / tokens) for p, g in zip(*halves, strict=True)]
    assert sum(part[0] for part in parts).item() == pytest.approx(aux.item(), rel=1e-12)
    assert sum(part[1] for part in parts).item() == pytest.approx(z.item(), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_loss_per_sequence_equals_the_reference_and_adds_up_over_ranks(batch: int) -> None:
    """Six positions of each sequence, on two ranks of two and four."""
    probs_TE = (random(6 * batch, 4).double() * 3).softmax(-1)
    chosen = [reference.choose(p, 2) for p in probs_TE]
    wanted = reference.sequence_balancing_loss(probs_TE, chosen, 6 * [*range(batch)]).item()
    parts = [balancing_loss(p, torch.tensor(chosen), batch) for p in probs_TE.split([2 * batch, 4 * batch])]
    assert sum(parts).item() == pytest.approx(wanted, rel=1e-12)


def test_loss_per_sequence_is_flaxformers_but_for_its_factor_k() -> None:
    """flaxformer/architectures/moe/routing.py:_load_balancing_loss, with a sequence for its group."""
    probs_TE = (random(24, 4).double() * 3).softmax(-1)
    experts_TK = probs_TE.topk(2).indices
    mask_SBE = torch.zeros_like(probs_TE).scatter(1, experts_TK, 1.0).view(8, 3, 4)
    theirs = (mask_SBE.mean(0) * probs_TE.view(8, 3, 4).mean(0)).mean() * 4**2
    assert 2 * balancing_loss(probs_TE, experts_TK, 3).item() == pytest.approx(theirs.item(), rel=1e-12)


def test_z_loss_survives_large_logits() -> None:
    assert z_sum(torch.tensor([[200.0, 0.0]])).item() == pytest.approx(40000.0)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "limit"),
    [
        (8, 1, 4, 1.0, 2),
        (9, 1, 4, 1.0, 3),  # rounded up
        (50, 1, 1, 1.1, 55),  # 1.1 * 50 is 55.00000000000001 in floating point
        (8, 2, 4, 1.25, 5),
        (1, 1, 64, 1.0, 1),  # never nothing
        (1024, 2, 8, 1.25, 320),
    ],
)
def test_capacity_by_hand(tokens: int, top_k: int, experts: int, factor: float, limit: int) -> None:
    assert capacity(tokens, top_k, experts, factor) == limit


@given(st.integers(1, 10**5), st.integers(1, 8), st.integers(1, 512), st.integers(1, 400).map(lambda n: n / 100))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_capacity_equals_exact_arithmetic(tokens: int, top_k: int, experts: int, factor: float) -> None:
    assert capacity(tokens, top_k, experts, factor) == reference.expert_capacity(tokens, top_k, experts, factor)


def test_first_choices_come_before_second_choices() -> None:
    """Drawn by hand, two places per expert. Expert 0: first choices of tokens 1 and 2 fill it, so token 0's second
    choice loses although that token comes earlier. Expert 1: token 0's first, then token 1's second choice."""
    experts_MK = torch.tensor([[1, 0], [0, 1], [0, 2], [2, 1]])
    keep_MK = within_capacity(experts_MK, num_experts=3, limit=2)
    assert keep_MK.tolist() == [[True, False], [True, True], [True, True], [True, False]]


@given(st.integers(1, 12), st.integers(1, 3), st.integers(3, 5), st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kept_choices_equal_the_reference(tokens: int, top_k: int, experts: int, limit: int, seed: int) -> None:
    experts_MK = random(tokens, experts, seed=seed).argsort(1)[:, :top_k]
    kept = within_capacity(experts_MK, experts, limit)
    assert kept.tolist() == reference.keep_first(experts_MK.tolist(), experts, limit)


def test_the_largest_gates_are_kept() -> None:
    """Drawn by hand, two places per expert. Expert 0 is wanted with 0.4, 0.9, 0.6 and, as a second choice, 0.5; expert
    1 with 0.5, 0.1 and 0.5: equal, and token 0's first choice comes before token 3's."""
    experts_MK = torch.tensor([[1, 0], [0, 1], [0, 2], [1, 0]])
    gates_MK = torch.tensor([[0.5, 0.4], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    keep_MK = within_capacity(experts_MK, 3, 2, gates_MK)
    assert keep_MK.tolist() == [[True, False], [True, False], [True, True], [True, False]]
    keep_MK = within_capacity(experts_MK, 3, 1, gates_MK)
    assert keep_MK.tolist() == [[True, False], [True, False], [False, True], [False, False]]


@given(st.integers(1, 12), st.integers(1, 3), st.integers(3, 5), st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kept_gates_equal_the_reference(tokens: int, top_k: int, experts: int, limit: int, seed: int) -> None:
    """Gates of only a few values, so that many are equal."""
    scores = random(tokens, experts, seed=seed)
    experts_MK, gates_MK = scores.argsort(1)[:, :top_k], scores[:, :top_k].round()
    kept = within_capacity(experts_MK, experts, limit, gates_MK)
    assert kept.tolist() == reference.keep_largest(experts_MK.tolist(), gates_MK.tolist(), experts, limit)


@pytest.mark.parametrize("by_gate", [False, True])
def test_each_sequence_has_a_capacity_of_its_own(by_gate: bool) -> None:
    """As every sequence by itself, with a limit of each."""
    experts_MK = torch.tensor([reference.choose(p, 2) for p in random(12, 4)])
    gates_MK, limits = random(12, 2, seed=2) if by_gate else None, torch.tensor([1, 2, 3])
    kept_MK = within_capacity(experts_MK, 4, limits, gates_MK, sequences=3)
    for b in range(3):
        alone = within_capacity(experts_MK[b::3], 4, b + 1, None if gates_MK is None else gates_MK[b::3])
        assert torch.equal(kept_MK[b::3], alone)


def test_attached_loss_feeds_its_scale_into_the_loss_and_passes_the_rest() -> None:
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    out = AttachLoss.apply(y, x.square(), 0.25)
    assert torch.equal(out, y)
    (out * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad == 0.25 * 2 * 3
    assert y.grad is not None and y.grad.tolist() == [5.0, 7.0]
