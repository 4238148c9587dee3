"""Losses on preferences against their formulas, computed in float64 number by number."""

import itertools
import math
import random

import pytest
import torch

from models.preference_losses import pair_losses, ranking_losses


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def reference(ratios, lengths, loss, beta, smoothing):
    """TRL 1.16, trl/trainer/dpo_trainer.py: DPOTrainer._compute_loss; smoothing as in Mitchell's note on cDPO."""
    (chosen, rejected), (long, short) = ratios, lengths
    if loss != "sigmoid":
        chosen, rejected = chosen / long, rejected / short
    margin = chosen - rejected
    if loss == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * log_sigmoid(beta * margin) - smoothing * log_sigmoid(-beta * margin)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_pair(loss, smoothing):
    random.seed(1)
    ratios = [[random.gauss(0, 5), random.gauss(0, 5)] for _ in range(9)]
    lengths = [[random.randint(1, 40), random.randint(1, 40)] for _ in range(9)]
    got = pair_losses(
        torch.tensor(ratios, dtype=torch.float64),
        torch.tensor(lengths, dtype=torch.float64),
        loss=loss,
        beta=0.3,
        label_smoothing=0.0 if loss == "ipo" else smoothing,
    )
    wanted = [reference(r, n, loss, 0.3, smoothing) for r, n in zip(ratios, lengths, strict=True)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_policy_that_is_the_reference_has_the_loss_of_a_coin():
    for loss, wanted in {"sigmoid": math.log(2), "sigmoid_norm": math.log(2), "ipo": 25.0}.items():
        got = pair_losses(torch.zeros(1, 2), torch.full((1, 2), 3.0), loss=loss, beta=0.1)
        assert got.item() == pytest.approx(wanted)


def test_the_loss_of_ranked_responses():
    """Over prompts with 4, 3 and 2 responses; the rewards of those that do not exist are not finite."""
    random.seed(2)
    rewards = [[random.gauss(0, 2) for _ in range(n)] for n in (4, 3, 2)]
    padded = torch.tensor([r + [math.nan] * (4 - len(r)) for r in rewards], dtype=torch.float64)
    for centering in (0.0, 0.01):
        got = ranking_losses(padded, ~padded.isnan(), centering=centering)
        for row, mine in zip(rewards, got.tolist(), strict=True):
            pairs = list(itertools.combinations(row, 2))
            wanted = sum(centering * (a + b) ** 2 - log_sigmoid(a - b) for a, b in pairs) / len(pairs)
            assert mine == pytest.approx(wanted, rel=1e-12)


def test_responses_that_do_not_exist_get_no_gradient():
    rewards = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    exists = torch.tensor([[True, True, True, False], [True, True, False, False], [True, False, False, False]])
    losses = ranking_losses(rewards, exists, centering=0.1)
    assert losses[2] == 0
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    assert ((gradient != 0) == exists & (exists.sum(1, keepdim=True) > 1)).all()
    assert torch.autograd.gradcheck(lambda r: ranking_losses(r, exists, centering=0.1), rewards)
