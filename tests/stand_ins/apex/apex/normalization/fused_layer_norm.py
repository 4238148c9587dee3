"""Stands for apex.normalization.fused_layer_norm."""

from typing import Any

import torch
from torch import Tensor, nn


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    assert tuple(normalized_shape) == tuple(weight.shape)
    values = input.float() * torch.rsqrt(input.float().square().mean(-1, keepdim=True) + eps)
    return (values * weight.float()).to(input.dtype)


class FusedRMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ):
        super().__init__()
        assert elementwise_affine
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.memory_efficient = eps, memory_efficient
        self.weight = nn.Parameter(torch.ones(self.normalized_shape))

    def forward(self, input: Tensor) -> Tensor:
        return fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps, self.memory_efficient)
