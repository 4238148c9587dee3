"""Stands for transformer_engine.pytorch.router.

Legend: T tokens, E experts.
"""

import torch
from torch import Tensor


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(probabilities [T, E] of the chosen experts, zero elsewhere; which experts were chosen, bool [T, E])."""
    assert logits.dtype != torch.float64
    softmax = score_function == "softmax"
    assert softmax or score_function == "sigmoid"
    before_TE = logits.float().softmax(-1) if use_pre_softmax else logits.float()
    scores_TE = before_TE if softmax else logits.float().sigmoid()
    chosen_TE = scores_TE if expert_bias is None else scores_TE + expert_bias
    if num_groups and group_topk:
        groups_TGM = chosen_TE.unflatten(-1, (num_groups, -1))
        best_TG = groups_TGM.topk(topk // group_topk, -1).values.sum(-1)
        open_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(-1, best_TG.topk(group_topk, -1).indices, True)
        chosen_TE = groups_TGM.masked_fill(~open_TG[..., None], -torch.inf).flatten(-2)
    map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, chosen_TE.topk(topk, -1).indices, True)
    if softmax and not use_pre_softmax:
        probs_TE = scores_TE.masked_fill(~map_TE, -torch.inf).softmax(-1)
    else:
        probs_TE = scores_TE.masked_fill(~map_TE, 0.0)
        if not softmax and topk > 1:
            probs_TE = probs_TE / (probs_TE.sum(-1, keepdim=True) + 1e-20)
    return (probs_TE * (scaling_factor or 1.0)).to(logits.dtype), map_TE
