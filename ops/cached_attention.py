"""Attention of a few queries to the keys and values that a cache holds, for text generation; there is no gradient.

Legend: B batch, H heads of this rank, G key/value groups of this rank, S queries, T keys, N width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention(
    q_BHSN: Tensor,
    k_BGTN: Tensor,
    v_BGTN: Tensor,
    mask_B1ST: Tensor | None,
    *,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[B, H, S, N].

    Args:
        mask_B1ST: bool, True where a query sees a key; None: every query sees every key.
        scale: factor of the products of queries and keys.
        sinks_H: logits without a value in the heads' softmax (ops.varlen_attention.VarlenAttention).
    """
    batch, heads, queries, width = q_BHSN.shape
    groups = k_BGTN.shape[1]
    # The heads of a group see the same keys: they are further queries of one head, and no key is copied.
    q = q_BHSN.reshape(batch, groups, heads // groups * queries, width)
    mask = mask_B1ST if mask_B1ST is None or heads == groups else mask_B1ST.repeat(1, 1, heads // groups, 1)
    if sinks_H is None:
        out = F.scaled_dot_product_attention(q, k_BGTN, v_BGTN, attn_mask=mask, scale=scale)
    else:
        scores = (q @ k_BGTN.mT).float() * scale
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        sinks = sinks_H.float().view(groups, -1, 1).expand(-1, -1, queries).reshape(1, groups, -1, 1)
        # A sink is one more key that every query sees, and whose value is zero.
        weights = torch.cat((scores, sinks.expand(batch, -1, -1, -1)), dim=-1).softmax(-1)[..., :-1]
        out = weights.to(v_BGTN.dtype) @ v_BGTN
    return out.view(batch, heads, queries, width)
