"""Losses on preferences between responses to a prompt.

Legend: P prompts, K responses to each in rank order, the best first; a response that a prompt does not have is left
out by `exists_PK`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_losses(
    ratios_P2: Tensor, lengths_P2: Tensor, *, loss: str, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """The loss [P] of each pair of a chosen and a rejected response.

    sigmoid: DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with label smoothing the loss expected where this
    share of the labels is flipped (conservative DPO). sigmoid_norm: the same of log-ratios per token. ipo: eq. 17 of
    Azar et al. 2023 (arXiv:2310.12036), with log-ratios per token as in TRL.

    Args:
        ratios_P2: log pi(y|x) - log pi_ref(y|x) of the chosen and of the rejected response, summed over its tokens.
        lengths_P2: the number of these tokens.
    """
    if loss in ("ipo", "sigmoid_norm"):
        ratios_P2 = ratios_P2 / lengths_P2.clamp(min=1)
    margin_P = ratios_P2[:, 0] - ratios_P2[:, 1]
    if loss == "ipo":
        return (margin_P - 1 / (2 * beta)).square()
    kept_P, flipped_P = F.logsigmoid(beta * margin_P), F.logsigmoid(-beta * margin_P)
    return -(1 - label_smoothing) * kept_P - label_smoothing * flipped_P


def ranked_pairs(exists_PK: Tensor) -> Tensor:
    """bool [P, K, K]: whether response i is ranked above response j, for every i and j that exist."""
    above_KK = torch.ones(exists_PK.shape[1], exists_PK.shape[1], device=exists_PK.device).triu(1).bool()
    return above_KK & exists_PK[:, :, None] & exists_PK[:, None, :]


def mean_over_pairs(values_PKK: Tensor, exists_PK: Tensor) -> Tensor:
    """[P]: the mean over the pairs of a prompt's responses; 0 of a prompt with fewer than two."""
    pairs_PKK = ranked_pairs(exists_PK)
    return values_PKK.where(pairs_PKK, 0).sum((1, 2)) / pairs_PKK.sum((1, 2)).clamp(min=1)


def ranking_losses(rewards_PK: Tensor, exists_PK: Tensor, *, centering: float = 0.0) -> Tensor:
    """The loss [P] of each prompt: -log sigmoid(r_i - r_j), averaged over all pairs of its responses (Ouyang et al.
    2022, arXiv:2203.02155, eq. 1). Of two responses it is the loss of the Bradley-Terry model.

    Args:
        centering: coefficient of the mean of (r_i + r_j)^2 over the same pairs (arXiv:2312.09244, eq. 2).
    """
    first_PK1, second_P1K = rewards_PK[:, :, None], rewards_PK[:, None, :]
    losses_PKK = -F.logsigmoid(first_PK1 - second_P1K)
    if centering:
        losses_PKK = losses_PKK + centering * (first_PK1 + second_P1K).square()
    return mean_over_pairs(losses_PKK, exists_PK)
