"""Stands for transformer_engine.pytorch."""

from transformer_engine.pytorch import cpp_extensions, optimizers, permutation, router
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.module import GroupedLinear, LayerNormLinear, Linear, RMSNorm
from transformer_engine.pytorch.permutation import moe_permute, moe_unpermute
from transformer_engine.pytorch.quantization import autocast, fp8_autocast

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "autocast",
    "cpp_extensions",
    "fp8_autocast",
    "moe_permute",
    "moe_unpermute",
    "optimizers",
    "permutation",
    "router",
]
