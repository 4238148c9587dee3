"""A token's choice of experts by TransformerEngine: scores, groups of experts, selection and gates in one kernel. What
losses and metrics want of the scores of all experts is computed by PyTorch.

Legend: T tokens, E experts, K choices per token.
"""

import torch.nn.functional as F
from torch import Tensor

from ops.routing import RouterStats, Routing, Rule


class TeRoute:
    """ops.routing.FusedRoute."""

    def __init__(self) -> None:
        from transformer_engine.pytorch.router import (  # pyright: ignore[reportMissingImports]
            fused_topk_with_score_function,
        )

        self._choose = fused_topk_with_score_function

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor | None, padding_T: Tensor | None, rule: Rule, sequences: int
    ) -> Routing:
        softmax, groups = rule.score_function == "softmax", rule.groups > 1
        gates_TE, chosen_TE = self._choose(
            logits_TE.contiguous(),
            rule.top_k,
            # Softmax gates over their sum are the softmax of the chosen logits.
            use_pre_softmax=softmax and not (rule.after or rule.renormalize),
            num_groups=rule.groups if groups else None,
            group_topk=rule.top_k_groups if groups else None,
            scaling_factor=None if rule.scale == 1 else rule.scale,
            score_function=rule.score_function,
            expert_bias=bias_E,
        )
        ranked_TE = logits_TE.detach() if softmax else logits_TE.detach().sigmoid()
        ranked_TE = ranked_TE if bias_E is None else ranked_TE + bias_E
        # The likeliest first; ties go to the lower expert.
        by_index_TK = chosen_TE.byte().topk(rule.top_k).indices.sort(dim=-1).values
        order_TK = ranked_TE.gather(1, by_index_TK).sort(dim=-1, descending=True, stable=True).indices
        experts_TK = by_index_TK.gather(1, order_TK)
        gates_TK = gates_TE.gather(1, experts_TK)
        if padding_T is not None:
            experts_TK = experts_TK.masked_fill(padding_T[:, None], logits_TE.shape[1])
        probs_TE = (logits_TE if softmax else F.logsigmoid(logits_TE)).softmax(-1)
        stats = RouterStats.of(logits_TE, probs_TE, experts_TK, padding_T, sequences)
        return Routing(gates_TK, experts_TK, stats, logits_TE)
