"""Causal attention over whole sequences.

Legend: S sequence, B batch, H heads of this rank, G key/value groups of this rank, N width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import te
from ops.operation import Implementation, Operation
from ops.run_context import RunContext

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, H, S, N], k and v [B, G, S, N]) -> [B, H, S, N]; a query sees the keys up to its own."""


def torch_attention(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> Tensor:
    gqa = q_BHSN.shape[1] != k_BGSN.shape[1]
    return F.scaled_dot_product_attention(q_BHSN, k_BGSN, v_BGSN, is_causal=True, enable_gqa=gqa)


def _te(context: RunContext) -> CausalAttention:
    from ops.te_attention import TeAttention

    return te.load(TeAttention).causal


def _trial(attend: CausalAttention, context: RunContext) -> list[Tensor]:
    """Of heads as wide as the run's, so many for a key as the run has."""
    model, keys = context.model, 2
    queries = keys * (model.num_attention_heads // model.query_groups)
    q, k, v = (
        context.randn(1, heads, 530, model.head_width, seed=seed).requires_grad_()
        for seed, heads in enumerate((queries, keys, keys))
    )
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), context.randn(*out.shape, seed=3))]


ATTENTION: Operation[CausalAttention] = Operation(
    field="causal_attention",
    name="attention",
    reference=lambda context: Implementation(
        "torch scaled_dot_product_attention",
        lambda context: torch_attention,
        "picks the fastest kernel of the device itself",
    ),
    implementations=[
        Implementation(
            te.NAME,
            _te,
            device="cuda",
            dtypes=(torch.bfloat16,),
            is_supported=te.is_meant,
        ),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=lambda context: context.needs_causal,
    asked=te.asked,
    refusal=f"attention: {te.REFUSAL}",
)
