"""The optimizer: its class, torch's AdamW or a package's, and the update of a block where BlockAdamW is needed."""

from collections.abc import Callable

import torch
from torch import Tensor

from ops import te
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext
from parallel.block_adamw import describe, is_needed
from parallel.block_update import Block, UpdateBlock, in_torch
from parallel.optimizers import OPTIMIZERS


def _trial(adamw: Callable[..., torch.optim.Optimizer], context: RunContext) -> list[Tensor]:
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
        Implementation(
            "TransformerEngine FusedAdam",
            "transformer_engine.pytorch.optimizers:FusedAdam",
            is_supported=te.is_meant,
        ),
        Implementation("Apex FusedAdam", "apex.optimizers:FusedAdam"),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5},
    is_used=lambda context: context.train and not is_needed(context.config.optim),
)


def _update_trial(update: UpdateBlock, context: RunContext) -> list[Tensor]:
    """Three steps of the second of two shards along both dimensions, with the run's types."""
    optim, (rows, columns) = context.config.optim, (12, 100)
    size, narrow = rows * columns, torch.bfloat16
    of_state = narrow if optim.state_dtype == "bf16" else torch.float32
    of_gradient = narrow if optim.grad_dtype == "bf16" and context.dtype == narrow else torch.float32
    weight = context.randn(size, seed=1, dtype=torch.float32)
    model = weight.to(narrow) if context.dtype == narrow else None
    state = {name: torch.zeros_like(weight, dtype=of_state) for name in OPTIMIZERS[optim.name].state}
    inner = columns, columns, columns
    for step in range(1, 4):
        gradient = context.randn(size, seed=1 + step, dtype=of_gradient)
        update(
            Block(
                weight, gradient, state, model,
                grad_scale=0.3, seed=12345 - step, first=70, index_steps=[inner, (2 * size, 0, 2 * size)],
                step=step, lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8,
            )
        )  # fmt: skip
    return [weight, *state.values(), *([] if model is None else [model])]


BLOCK_UPDATE = Operation(
    field="update_block",
    name="optimizer",
    reference=lambda context: Implementation("torch", lambda context: in_torch(OPTIMIZERS[context.config.optim.name])),
    implementations=[
        Implementation(
            "Triton",
            "ops.triton.adamw:update",
            device="cuda",
            is_supported=lambda context: OPTIMIZERS[context.config.optim.name].update is OPTIMIZERS["adamw"].update,
        )
    ],
    trial=_update_trial,
    # A value that differs in its last bit may be rounded to another bf16 value.
    tolerance={torch.float32: 1e-3, torch.bfloat16: 1e-3},
    is_used=lambda context: context.train and is_needed(context.config.optim),
    describe=lambda context, row: Row(
        row.operation,
        f"{describe(context.config.optim)[0]}, {row.name}",
        "; ".join(filter(None, (describe(context.config.optim)[1], row.why))),
        row.refused,
    ),
)
