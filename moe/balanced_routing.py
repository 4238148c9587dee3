"""Choices that are balanced when they are made, instead of by a loss.

Legend: M tokens of the micro-batch (all ranks that share it), E experts, K places for choices per token, C choices of
an expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SINKHORN_ROUNDS = 32
"""Fixed, so that no device has to be asked whether it has converged, and no layout stops a round earlier."""
_DEEPEST = -300.0
"""Logits further than this below a token's best count as that: products of e^300 still fit into fp64."""


TIE = 2.0**-18
"""Scores whose relative distance is at most this are taken as equal. Tokens with the same past, such as the first ones
of documents that begin alike, have equal scores but for the order in which a layout adds in fp32, about 2**-22."""
WIDEST_TIE = 2.0**-12
"""Relative width at which a chain of such scores, each close to the next, is divided."""


def tie_ranks(scores_NX: Tensor, groups_NX: Tensor | None = None) -> Tensor:
    """int64 [N, X]: the rank of each score in its row, the largest first; nearly equal scores share one, so that a
    stable sort by rank leaves what is nearly equal in its order whatever the rounding.

    A grid of scores would put an edge between some scores that are equal but for rounding. Here, a gap between
    neighbours of the sorted row ends a tie, and equal scores have no gap. Only a chain of close scores that is wider
    than WIDEST_TIE, as very many tokens make it, is divided by a grid, which starts at its largest score.

    Args:
        groups_NX: int64 [N, X]; scores of different groups share no rank, and lower groups come first.
    """
    order_NX = scores_NX.argsort(dim=-1, descending=True, stable=True)
    new_NX = torch.zeros_like(order_NX, dtype=torch.bool)
    if groups_NX is not None:
        order_NX = order_NX.gather(-1, groups_NX.gather(-1, order_NX).argsort(dim=-1, stable=True))
        sorted_groups_NX = groups_NX.gather(-1, order_NX)
        new_NX[..., 1:] = sorted_groups_NX.diff(dim=-1) != 0
    value_NX = scores_NX.gather(-1, order_NX)
    new_NX[..., 1:] |= value_NX[..., :-1] - value_NX[..., 1:] > TIE * value_NX[..., :-1].abs()
    places_X = torch.arange(scores_NX.shape[-1], device=scores_NX.device)
    head_NX = value_NX.gather(-1, torch.where(new_NX, places_X, 0).cummax(dim=-1).values)
    # Not-a-number, of infinities and zeros, is within the tie.
    part_NX = ((head_NX - value_NX) / (WIDEST_TIE * head_NX.abs())).nan_to_num(0.0).clamp(max=2.0**40).long()
    new_NX[..., 1:] |= part_NX.diff(dim=-1) != 0
    return torch.empty_like(order_NX).scatter(-1, order_NX, new_NX.cumsum(-1))


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


def plan_ranks(balanced_TE: Tensor) -> Tensor:
    """int64 [T, E]: the order of each token's experts by their logits with potentials, nearly equal ones sharing a rank
    (tie_ranks). -inf comes last."""
    scaled_TE = (balanced_TE - balanced_TE.amax(1, keepdim=True)).clamp(min=_DEEPEST).exp()
    return tie_ranks(scaled_TE.masked_fill(balanced_TE == -torch.inf, 0.0))


def expert_choice(scores_ME: Tensor, limit: int, padding_M: Tensor | None = None) -> Tensor:
    """int64 [M, K]: the experts that took each token, in order, and E in the places left over; K is as large as the
    token with the most experts needs. Each expert takes its C = limit best tokens (Zhou et al. 2022, arXiv:2202.09368,
    section 3.2), among equals (tie_ranks) the earlier ones.

    Args:
        limit: at most the tokens there are.
        padding_M: True where there is no token.
    """
    tokens, experts = scores_ME.shape
    if padding_M is not None:
        scores_ME = scores_ME.masked_fill(padding_M[:, None], -torch.inf)
    best_EC = tie_ranks(scores_ME.t().contiguous()).sort(dim=1, stable=True).indices[:, :limit]
    taken_ME = torch.zeros(experts, tokens, dtype=torch.bool, device=scores_ME.device).scatter(1, best_EC, True).t()
    token_R, expert_R = taken_ME.nonzero(as_tuple=True)
    place_ME = taken_ME.cumsum(1)
    width = max(1, int(place_ME[:, -1].max())) if tokens else 1
    experts_MK = torch.full((tokens, width), experts, device=scores_ME.device)
    experts_MK[token_R, place_ME[token_R, expert_R] - 1] = expert_R
    return experts_MK


CHOSEN_LOGIT = 10.0
"""Of a chosen expert where balance is forced; 0 of the others. No trained bias reaches the difference."""


class ForceBalance(torch.autograd.Function):
    """Replaces logits by ones that send the tokens to all experts in turn, whatever the router prefers: token t to
    experts K t, ..., K t + K - 1 modulo E. The gradient passes through unchanged. For benchmarks."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int) -> Tensor:
        tokens, experts = logits_TE.shape
        first_T = torch.arange(tokens, device=logits_TE.device) * top_k
        experts_TK = (first_T[:, None] + torch.arange(top_k, device=logits_TE.device)) % experts
        return torch.zeros_like(logits_TE).scatter_(1, experts_TK, CHOSEN_LOGIT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None]:
        return grad_TE, None
