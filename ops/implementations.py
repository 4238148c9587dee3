"""The implementations that a model's layers call, one for each operation."""

from dataclasses import dataclass

import torch

from ops.attention import CausalAttention, torch_attention
from ops.cp_attention import CpAttention
from ops.cross_entropy import TokenLosses, token_losses
from ops.dispatch import DispatcherFactory
from ops.experts import LOOP, ExpertBackend
from ops.fp8 import Float8
from ops.linear import MEGATRON_LAYERS, LinearLayers
from ops.norm import Norm, torch_rms_norm
from ops.norm_linear import NormLinear
from ops.permute import TORCH_PERMUTATION, Permutation
from ops.rotary import ApplyRotary, apply_rotary
from ops.routing import FusedRoute, RouterLogits, router_logits
from ops.te_fp8 import TransformerEngineFp8
from ops.varlen_attention import VarlenAttention, joined_attention
from parallel.block_update import UpdateBlock


@dataclass(frozen=True)
class Ops:
    """What ops.registry.select has chosen; by default torch's."""

    apply_rotary: ApplyRotary = apply_rotary
    """Rotates queries and keys by the angles of their positions."""
    rms_norm: Norm = torch_rms_norm
    linear: LinearLayers = MEGATRON_LAYERS
    """Of attention and of dense and shared feed-forward layers."""
    norm_linear: NormLinear | None = None
    """A norm and a linear layer that reads it; None: one after the other."""
    token_losses: TokenLosses = token_losses
    """Cross-entropy over a sharded vocabulary."""
    causal_attention: CausalAttention = torch_attention
    """Attention where a query sees all tokens before it."""
    varlen_attention: VarlenAttention = joined_attention
    """Attention within documents, windows and chunks, to other ranks' keys, and with sinks."""
    cp_attention: CpAttention | None = None
    """Attention that context-parallel ranks compute together; None: each gathers the keys and values of all."""
    permutation: Permutation = TORCH_PERMUTATION
    """How tokens become the experts' rows on a rank, and rows tokens."""
    router_logits: RouterLogits = router_logits
    """The product of tokens with a router's weight."""
    route: FusedRoute | None = None
    """What follows it; None: the router's own operations."""
    experts: ExpertBackend = LOOP
    """The products of experts in bf16 or fp32."""
    float8: Float8 | None = None
    """Which layers compute in FP8, and with what."""
    te_fp8: TransformerEngineFp8 | None = None
    """The same by TransformerEngine."""
    dispatcher: DispatcherFactory | None = None
    """How rows travel to their experts' ranks; None: as moe.dispatcher.dispatcher_for says."""
    fuse_weight_gradient: bool = False
    """Whether Megatron-Core's linear layers add weight gradients to the main gradients themselves."""
    adamw: type[torch.optim.Optimizer] = torch.optim.AdamW
    update_block: UpdateBlock | None = None
    """The update of a block of weights by BlockAdamW; None: in plain PyTorch."""


DEFAULT_OPS = Ops()
