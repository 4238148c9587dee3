"""Expert dropout (Switch, arXiv:2101.03961, section 2.4): when a sparse model is trained further on little data, its
experts' hidden units are dropped at a higher rate than anything else, against overfitting.

Legend: T tokens, K choices per token, R routed rows, F hidden width of an expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.counter_rng import uniform


@dataclass(frozen=True)
class Dropout:
    """Of each row's hidden units, each by itself with probability `rate`, whichever rank computes the row."""

    rate: float
    key: int
    """From moe.counter_rng.key: seed, step and layer."""
    names_R: Tensor
    """int64: which expert's answer to which token of which micro-batch a row asks for."""
    width: int
    """F over all ranks."""

    def factors(self, rows: slice, part: int, parts: int, dtype: torch.dtype) -> Tensor:
        """[rows, F / parts]: 0 where a unit is dropped, else 1 / (1 - rate)."""
        kept_RF = uniform(self.key, self.names_R[rows], self.width) >= self.rate
        return kept_RF.chunk(parts, dim=1)[part].to(dtype) / (1 - self.rate)


def name_choices(experts_TK: Tensor, num_experts: int, *, part: int, parts: int, micro_batch: int) -> Tensor:
    """int64 [T, K]: a number for each choice that no other choice of the step has, by token and expert.

    Args:
        experts_TK: E where there is no choice.
        part, parts: which of the equal parts of the micro-batch's tokens these are.
    """
    tokens = len(experts_TK)
    token_T = torch.arange(tokens, device=experts_TK.device) + (micro_batch * parts + part) * tokens
    return token_T[:, None] * (num_experts + 1) + experts_TK
