"""Rotary positions and causal attention in C++ (attention.cpp).

Legend: B batch, H heads, G key/value groups, S sequence, N width of a head.
"""

from torch import Tensor

from ops.cpp.operators import NAMESPACE


def causal_attention(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> Tensor:
    """softmax(q k.T / sqrt(N)) v over each query's own position and those before it, in bf16; sums are in fp32. Head h
    looks into group h // (H / G)."""
    out_BHSN, _ = NAMESPACE.causal_attention.default(q_BHSN, k_BGSN, v_BGSN)
    return out_BHSN


def apply_rotary(x_SBHN: Tensor, cos: Tensor, sin: Tensor, out_SBHN: Tensor, *, backward: bool = False) -> Tensor:
    """ops.rotary.apply_rotary in bf16."""
    NAMESPACE.apply_rotary.default(x_SBHN, cos, sin, out_SBHN, backward)
    return out_SBHN
