"""What keeps experts evenly and boundedly loaded: the auxiliary losses and the capacity.

Legend: T tokens of this rank, M tokens of the micro-batch (all ranks that share it), E experts, K choices per token,
B sequences of the micro-batch, or 1 where it is balanced as a whole, X anything.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def count(index_X: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each index occurs. torch.bincount would make the host wait for the device."""
    return index_X.new_zeros(size).scatter_add_(0, index_X, torch.ones_like(index_X))


def count_loads(experts_MK: Tensor, num_experts: int, sequences: int = 1) -> Tensor:
    """int64 [B, E]: choices of each expert, of each sequence by itself. Index E is no choice.

    Args:
        sequences: B, where tokens come in the order of (position, sequence).
    """
    sequence_M = torch.arange(len(experts_MK), device=experts_MK.device) % sequences
    flat = (sequence_M[:, None] * (num_experts + 1) + experts_MK).flatten()
    counts = count(flat, sequences * (num_experts + 1))
    return counts.view(sequences, num_experts + 1)[:, :num_experts]


@dataclass(frozen=True)
class Tallies:
    """What losses and log want of the router's scores: sums over this rank's tokens, in which padding has no part."""

    load_BE: Tensor
    """int64: choices of each expert, before any drop."""
    probs_BE: Tensor
    """Of the probabilities, with gradient."""
    z: Tensor
    """Of logsumexp(logits)^2, with gradient."""
    entropy: Tensor
    """Of the entropies of the tokens' distributions, in nats."""
    logit_square: Tensor
    """Of the mean squared logits."""

    @staticmethod
    def of(
        logits_TE: Tensor, probs_TE: Tensor, experts_TK: Tensor, padding_T: Tensor | None = None, sequences: int = 1
    ) -> "Tallies":
        """Args:
        experts_TK: the choices; index E is none.
        padding_T: True where there is no token.
        sequences: B, where tokens come in the order of (position, sequence).
        """

        def counted(values_TX: Tensor) -> Tensor:
            return values_TX if padding_T is None else values_TX.masked_fill(padding_T[:, None], 0.0)

        probs_BE = counted(probs_TE).unflatten(0, (len(probs_TE) // sequences, sequences)).sum(0)
        z = counted(logits_TE.logsumexp(-1, keepdim=True).square()).sum()
        with torch.no_grad():
            entropy = counted(-torch.special.xlogy(probs_TE, probs_TE).sum(1, keepdim=True)).sum()
            square = counted(logits_TE.square().mean(1, keepdim=True)).sum()
        return Tallies(count_loads(experts_TK, probs_TE.shape[1], sequences), probs_BE, z, entropy, square)


def load_balancing_loss(probs_BE: Tensor, load_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """This rank's part of E * sum_e f_e P_e (Switch, arXiv:2101.03961, eq. 4 to 6): 1 when uniform, E when one expert
    gets all. With several sequences the mean of each one's loss (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20). Summed
    over the ranks of a micro-batch it is the micro-batch's loss.

    Args:
        probs_BE: router probabilities, summed over this rank's tokens (Tallies).
        load_BE: loads of the experts, of which only the proportions count: choices before any drop. A row for the
            whole micro-batch, or for each of its sequences; each rank holds part of every sequence.
        tokens_B: tokens over which the probabilities are averaged, on all ranks; a sequence without any is left out.
    """
    load_BE = load_BE.to(probs_BE.dtype)
    relative_BE = load_BE / load_BE.sum(1, keepdim=True).clamp(min=1) * load_BE.shape[1]
    of_each_B = (relative_BE * probs_BE).sum(1) / tokens_B.clamp(min=1)
    return of_each_B.sum() / (tokens_B > 0).sum().clamp(min=1)


class AttachLoss(torch.autograd.Function):
    """Passes y through and, in backward, feeds `scale` into `loss`, so that a loss computed inside the model reaches
    its parameters whatever the pipeline schedule does with the output."""

    @staticmethod
    def forward(ctx, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Choices that one expert takes of a micro-batch (Switch, eq. 3): ceil(factor * tokens * top_k / num_experts)."""
    # The tiny step back keeps 1.1 * 50 = 55.00000000000001 from being rounded up to 56.
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)


def within_capacity(
    experts_MK: Tensor,
    num_experts: int,
    limit: int | Tensor,
    urgency_MK: Tensor | None = None,
    sequences: int = 1,
) -> Tensor:
    """bool [M, K]: the choices that fit, each expert taking the first `limit` of its own. Index E is no choice and
    does not fit.

    Args:
        urgency_MK: None: first choices of all tokens come before second choices; among equals the earlier token wins.
            Else more urgent choices come first, and that order decides between equals.
        sequences: B, where each sequence has a capacity of its own, `limit` (int64 [B]), and tokens come in the order
            of (position, sequence).
    """
    sequence_M = torch.arange(len(experts_MK), device=experts_MK.device) % sequences
    expert_KM = (experts_MK + (num_experts + 1) * sequence_M[:, None]).t().reshape(-1)
    if urgency_MK is None:
        order = expert_KM.argsort(stable=True)
    else:
        by_urgency = urgency_MK.t().reshape(-1).argsort(descending=True, stable=True)
        order = by_urgency[expert_KM[by_urgency].argsort(stable=True)]
    counts_E = count(expert_KM, sequences * (num_experts + 1))
    first_E = counts_E.cumsum(0) - counts_E
    place_in_expert = torch.arange(order.numel(), device=order.device) - first_E[expert_KM[order]]
    keep = torch.empty_like(expert_KM, dtype=torch.bool)
    if isinstance(limit, Tensor):
        limit = limit[expert_KM[order] // (num_experts + 1)]
    keep[order] = place_in_expert < limit
    keep &= expert_KM % (num_experts + 1) < num_experts
    return keep.view(experts_MK.shape[::-1]).t()
