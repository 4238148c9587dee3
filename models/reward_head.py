"""The output of a reward model: a linear layer to one number.

Legend: S sequence (this rank's slice), B batch, D hidden.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parallel.process_groups import Groups
from parallel.sharding import mark, set_sharding


class RewardHead(nn.Module):
    """The reward of every token, in fp32. Replicated over the tensor-parallel ranks."""

    def __init__(self, hidden_size: int, config: TransformerConfig, groups: Groups):
        super().__init__()
        self.groups, self.sequence_parallel = groups, config.sequence_parallel
        weight_1D = nn.Parameter(torch.empty(1, hidden_size, dtype=config.params_dtype))
        self.weight = set_sharding(weight_1D, replicas=(groups.tp,), std=(hidden_size + 1) ** -0.5)
        # Each tensor-parallel rank then sees other tokens, as in the norms.
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """fp32 [S, B], of all tokens on every tensor-parallel rank."""
        rewards_SB = F.linear(x_SBD.float(), self.weight.float()).squeeze(-1)
        if self.sequence_parallel:
            # What follows is computed on every rank, so that each takes its own part of the gradient.
            rewards_SB = gather_from_sequence_parallel_region(
                rewards_SB, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return rewards_SB
