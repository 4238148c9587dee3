"""How many assignments an expert accepts, and which of them.

Legend: M tokens of the micro-batch (all ranks that share it), E experts, K choices per token.
"""

import math

import torch
from torch import Tensor

from ops.routing import count


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Choices that one expert takes of a micro-batch (Switch, eq. 3): ceil(factor * tokens * top_k / num_experts)."""
    # The tiny step back keeps 1.1 * 50 = 55.00000000000001 from being rounded up to 56.
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)


def within_capacity(
    experts_MK: Tensor,
    num_experts: int,
    limit: int | Tensor,
    priority_MK: Tensor | None = None,
    sequences: int = 1,
) -> Tensor:
    """bool [M, K]: the choices that fit, each expert taking the first `limit` of its own. Index E is no choice and
    does not fit.

    Args:
        priority_MK: None: first choices of all tokens come before second choices; among equals the earlier token wins.
            Else more urgent choices come first, and that order decides between equals.
        sequences: B, where each sequence has a capacity of its own, `limit` (int64 [B]), and tokens come in the order
            of (position, sequence).
    """
    sequence_M = torch.arange(len(experts_MK), device=experts_MK.device) % sequences
    expert_KM = (experts_MK + (num_experts + 1) * sequence_M[:, None]).t().reshape(-1)
    if priority_MK is None:
        order = expert_KM.argsort(stable=True)
    else:
        by_priority = priority_MK.t().reshape(-1).argsort(descending=True, stable=True)
        order = by_priority[expert_KM[by_priority].argsort(stable=True)]
    counts_E = count(expert_KM, sequences * (num_experts + 1))
    first_E = counts_E.cumsum(0) - counts_E
    place_in_expert = torch.arange(order.numel(), device=order.device) - first_E[expert_KM[order]]
    keep = torch.empty_like(expert_KM, dtype=torch.bool)
    if isinstance(limit, Tensor):
        limit = limit[expert_KM[order] // (num_experts + 1)]
    keep[order] = place_in_expert < limit
    keep &= expert_KM % (num_experts + 1) < num_experts
    return keep.view(experts_MK.shape[::-1]).t()
