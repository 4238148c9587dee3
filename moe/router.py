"""The router: which experts a token visits, and with what weight.

Legend: T tokens of this rank, D hidden, E experts, K choices per token, G groups of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from moe.recompute import decision
from parallel.placement import place
from parallel.runtime import Groups

TINY = 1e-20
"""Added to sums of sigmoids, which can all underflow to zero."""


@dataclass(frozen=True)
class Routing:
    """The decision for T tokens, fp32."""

    logits_TE: Tensor
    probs_TE: Tensor
    """The scores of all experts, each token's divided by their sum: what is balanced and logged."""
    gates_TK: Tensor
    """The weight of each choice in the output."""
    experts_TK: Tensor
    """int64, the likeliest expert first; ties go to the lower expert."""


class Router(nn.Module):
    """Switch routing (Fedus et al. 2021, arXiv:2101.03961, eq. 1 and 2) with K choices, and what followed it: scores
    by softmax before or after the choice or by sigmoid, and a choice limited to a few groups of experts. Weight and
    arithmetic are fp32 whatever the model's precision (Switch, section 2.4)."""

    def __init__(self, model: ModelConfig, *, sequence_parallel: bool, groups: Groups):
        super().__init__()
        self.moe = model.moe
        self.renormalize = self.moe.top_k > 1 if self.moe.renormalize is None else self.moe.renormalize
        weight_ED = nn.Parameter(torch.empty(self.moe.num_experts, model.hidden_size, dtype=torch.float32))
        self.weight = place(weight_ED, copies=(groups.tp,), std=(model.init_scale / model.hidden_size) ** 0.5)
        # As for the norms: summed over the tensor-parallel group when its ranks see different tokens.
        self.weight.sequence_parallel = sequence_parallel
        self.bias: nn.Parameter | None = None
        if self.moe.bias_update_rate:
            # Set by rule and not by gradient, but kept, placed and saved as a parameter.
            bias_E = nn.Parameter(torch.empty(self.moe.num_experts, dtype=torch.float32), requires_grad=False)
            self.bias = place(bias_E, copies=(groups.tp,), std=0.0)

    def forward(self, x_TD: Tensor) -> Routing:
        # Autocast would bring the product back to bf16.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = x_TD.float() @ self.weight.t()
        if self.moe.score_function == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            probs_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)
        else:
            scores_TE = probs_TE = logits_TE.softmax(-1)
        if self.moe.softmax_order == "after":
            experts_TK = self._choose(logits_TE.detach())
            gates_TK = logits_TE.gather(1, experts_TK).softmax(-1)
        else:
            biased_TE = scores_TE.detach() if self.bias is None else scores_TE.detach() + self.bias
            experts_TK = self._choose(biased_TE)
            gates_TK = scores_TE.gather(1, experts_TK)
            if self.renormalize:
                gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + TINY)
        return Routing(logits_TE, probs_TE, gates_TK * self.moe.routed_scaling_factor, experts_TK)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """One step of DeepSeek-V3's rule (arXiv:2412.19437, section 2.1.2; arXiv:2408.15664, algorithm 1).

        Args:
            load_E: choices of each expert over the global batch of the step, exact.
        """
        assert self.bias is not None
        self.bias += self.moe.bias_update_rate * (load_E.mean() - load_E).sign().to(self.bias.dtype)

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """The K best experts [T, K], of the best groups when there are groups."""
        if self.moe.num_expert_groups > 1:
            scores_TE = scores_TE.masked_fill(~self._in_best_groups(scores_TE), -torch.inf)
        # A stable sort, because topk breaks ties differently from device to device.
        return decision(scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.moe.top_k])

    def _in_best_groups(self, scores_TE: Tensor) -> Tensor:
        """bool [T, E]: experts of the top_k_groups groups whose two best scores add up to most (DeepSeek-V3,
        arXiv:2412.19437, section 2.1.2)."""
        groups = self.moe.num_expert_groups
        score_TG = scores_TE.unflatten(1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
        chosen = score_TG.sort(dim=-1, descending=True, stable=True).indices[:, : self.moe.top_k_groups]
        allowed_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, chosen, True)
        return allowed_TG.repeat_interleave(scores_TE.shape[1] // groups, dim=1)
