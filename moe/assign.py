"""Choices that are balanced when they are made, instead of by a loss: both look at the whole micro-batch at once.

Legend: M tokens of the micro-batch (all ranks that share it), E experts, K places for choices per token, C choices of
an expert.
"""

import torch
from torch import Tensor

SINKHORN_ROUNDS = 32
"""Fixed, so that no device has to be asked whether it has converged, and no layout stops a round earlier."""
_DEEPEST = -300.0
"""Logits further than this below a token's best count as that: products of e^300 still fit into fp64."""


def sinkhorn_potentials(logits_ME: Tensor, padding_M: Tensor | None = None) -> Tensor:
    """fp64 [E], to be added to the logits: of the transport plan closest to exp(logits) that gives every token the
    same mass and every expert the same load, row t is proportional to exp(logits_te + potential_e). A token's best
    experts in it are S-BASE's choice (Clark et al. 2022, arXiv:2202.01169, section 3.1).

    Args:
        padding_M: True where there is no token.
    """
    scaled_ME = logits_ME.double()
    scaled_ME = (scaled_ME - scaled_ME.amax(1, keepdim=True)).clamp(min=_DEEPEST).exp()
    if padding_M is not None:
        scaled_ME = scaled_ME.masked_fill(padding_M[:, None], 0.0)
    weight_E = scaled_ME.new_ones(logits_ME.shape[1])
    smallest = torch.finfo(torch.float64).tiny
    for _ in range(SINKHORN_ROUNDS):
        # A token without mass, or an expert without tokens, is left as it is rather than divided by zero.
        row_M = 1 / (scaled_ME @ weight_E).clamp(min=smallest)
        weight_E = 1 / (row_M @ scaled_ME).clamp(min=smallest)
        weight_E = weight_E / weight_E.mean()
    return weight_E.log()


def expert_choice(scores_ME: Tensor, limit: int, padding_M: Tensor | None = None) -> Tensor:
    """int64 [M, K]: the experts that took each token, in order, and E in the places left over; K is as large as the
    token with the most experts needs. Each expert takes its C = limit best tokens (Zhou et al. 2022, arXiv:2202.09368,
    section 3.2), among equals the earlier ones.

    Args:
        limit: at most the tokens there are.
        padding_M: True where there is no token.
    """
    tokens, experts = scores_ME.shape
    if padding_M is not None:
        scores_ME = scores_ME.masked_fill(padding_M[:, None], -torch.inf)
    best_EC = scores_ME.t().contiguous().sort(dim=1, descending=True, stable=True).indices[:, :limit]
    taken_ME = torch.zeros(experts, tokens, dtype=torch.bool, device=scores_ME.device).scatter(1, best_EC, True).t()
    token_R, expert_R = taken_ME.nonzero(as_tuple=True)
    place_ME = taken_ME.cumsum(1)
    width = max(1, int(place_ME[:, -1].max())) if tokens else 1
    experts_MK = torch.full((tokens, width), experts, device=scores_ME.device)
    experts_MK[token_R, place_ME[token_R, expert_R] - 1] = expert_R
    return experts_MK
