"""The operations of a model, and what is chosen for them."""

from moe.dispatcher import DISPATCH
from moe.router import ROUTE
from ops.adamw import ADAMW, BLOCK_UPDATE
from ops.attention import ATTENTION
from ops.autotune import Memory
from ops.cp_attention import CP_ATTENTION
from ops.cross_entropy import CROSS_ENTROPY
from ops.experts import EXPERTS
from ops.fp8 import FLOAT8
from ops.implementations import Ops
from ops.linear import LINEAR
from ops.norm import RMS_NORM
from ops.norm_linear import NORM_LINEAR
from ops.operation import Row
from ops.permute import PERMUTATION
from ops.registry import select
from ops.rotary import ROTARY
from ops.routing import ROUTER_LOGITS
from ops.run_context import RunContext
from ops.te_fp8 import TE_FP8
from ops.varlen_attention import VARLEN_ATTENTION
from ops.weight_gradient import WEIGHT_GRADIENT

OPERATIONS = (
    ROTARY,
    RMS_NORM,
    LINEAR,
    NORM_LINEAR,
    CROSS_ENTROPY,
    VARLEN_ATTENTION,
    CP_ATTENTION,
    ATTENTION,
    PERMUTATION,
    ROUTER_LOGITS,
    ROUTE,
    FLOAT8,
    TE_FP8,
    EXPERTS,
    DISPATCH,
    WEIGHT_GRADIENT,
    ADAMW,
    BLOCK_UPDATE,
)
"""In the order of the start table."""


def select_ops(context: RunContext, memory: Memory | None = None) -> tuple[Ops, list[Row]]:
    """ops.registry.select, of all operations."""
    chosen, rows = select(OPERATIONS, context, memory)
    return Ops(**chosen), rows
