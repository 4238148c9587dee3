"""The optimizer's class: torch's AdamW, or a package's."""

import torch
from torch import Tensor

from ops.operation import Implementation, Operation
from ops.run_context import RunContext
from parallel.block_adamw import is_needed


def _trial(adamw: type[torch.optim.Optimizer], context: RunContext) -> list[Tensor]:
    """Five steps of two tensors."""
    sizes, fp32 = (7, 1000), torch.float32
    weights = [context.randn(n, seed=n, dtype=fp32).requires_grad_() for n in sizes]
    optimizer = adamw(weights, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        for weight in weights:
            weight.grad = context.randn(len(weight), seed=step, dtype=fp32)
        optimizer.step()
    return [weight.detach() for weight in weights]


ADAMW = Operation(
    field="adamw",
    name="optimizer",
    reference=lambda context: Implementation("torch AdamW, fused", lambda context: torch.optim.AdamW),
    implementations=[
        Implementation("TransformerEngine FusedAdam", "transformer_engine.pytorch.optimizers:FusedAdam"),
        Implementation("Apex FusedAdam", "apex.optimizers:FusedAdam"),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5},
    is_used=lambda context: context.train and not is_needed(context.config.optim),
)
