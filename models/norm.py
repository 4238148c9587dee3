"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4) as a layer."""

import torch
from torch import Tensor, nn

from ops.norm import Norm
from parallel.process_groups import Groups
from parallel.sharding import set_sharding


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        function: the implementation (ops.norm.RMS_NORM).
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        function: Norm,
        dtype: torch.dtype,
        sequence_parallel: bool,
        groups: Groups,
    ):
        super().__init__()
        self.eps, self.function = eps, function
        self.weight = set_sharding(nn.Parameter(torch.empty(hidden_size, dtype=dtype)), replicas=(groups.tp,))
        # Under sequence parallelism each tensor-parallel rank sees other tokens: Megatron-Core then sums this
        # gradient over the tensor-parallel group.
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)
