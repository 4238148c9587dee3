"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4) and LayerNorm (Ba et al. 2016, arXiv:1607.06450) as
layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.norm import Norm
from parallel.process_groups import Groups
from parallel.sharding import mark, set_sharding


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        function: the implementation (ops.norm.RMS_NORM).
        zero_centered: the parameter is what is added to 1: 1 + weight takes the place of weight.
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
        zero_centered: bool = False,
    ):
        super().__init__()
        self.eps, self.function, self.zero_centered = eps, function, zero_centered
        weight_D = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.weight = set_sharding(weight_D, replicas=(groups.tp,), std=0.0 if zero_centered else None)
        # Under sequence parallelism each tensor-parallel rank sees other tokens: Megatron-Core then sums this
        # gradient over the tensor-parallel group.
        mark(self.weight, sequence_parallel=sequence_parallel)

    @property
    def gain(self) -> Tensor:
        """What normalised values are multiplied by."""
        return self.weight + 1 if self.zero_centered else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.gain, self.eps)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension, by PyTorch."""

    def __init__(
        self, hidden_size: int, eps: float, *, dtype: torch.dtype, sequence_parallel: bool, groups: Groups, **how: Any
    ):
        super().__init__(hidden_size, eps, dtype=dtype, sequence_parallel=sequence_parallel, groups=groups, **how)
        bias_D = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.bias = set_sharding(bias_D, replicas=(groups.tp,), std=0.0)
        mark(self.bias, sequence_parallel=sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.gain, self.bias, self.eps)
