"""Whether Megatron-Core's linear layers add the gradient of a weight to its main gradient within the product that
computes it (gradient_accumulation_fusion), by a kernel of Apex. Without it the gradient is a tensor of its own, which
Megatron-Core's hook adds: a further pass over gradient and main gradient at every micro-batch.

Legend: R rows, K inner and N outer dimension of a product.
"""

import torch
from torch import Tensor, nn

from ops.operation import Implementation, Operation, Row, Unavailable
from ops.run_context import RunContext
from parallel import megatron_compat
from parallel.sharding import mark


def _trial(fused: bool, context: RunContext) -> list[Tensor]:
    """One of Megatron-Core's linear layers at the second micro-batch of a step: its main gradient has a value."""
    narrow = context.config.optim.grad_dtype == "bf16" and context.dtype == torch.bfloat16
    rows, inner, outer = 24, context.model.hidden_size, 48
    weight_NK = nn.Parameter(context.randn(outer, inner, seed=1) / inner**0.5)
    main_NK = context.randn(outer, inner, seed=2, dtype=torch.bfloat16 if narrow else torch.float32)
    mark(weight_NK, main_grad=main_NK, grad_added_to_main_grad=False)
    x_R1K = context.randn(rows, 1, inner).requires_grad_()
    y_R1N = megatron_compat.linear_product(x_R1K, weight_NK, context.groups.tp, fuse_weight_gradient=fused)
    dx_R1K, dw_NK = torch.autograd.grad(y_R1N, (x_R1K, weight_NK), context.randn(rows, 1, outer, seed=3))
    if not weight_NK.grad_added_to_main_grad:  # pyright: ignore[reportAttributeAccessIssue]
        main_NK.add_(dw_NK)
    return [y_R1N.detach(), dx_R1K, main_NK]


def _apex(context: RunContext) -> bool:
    import fused_weight_gradient_mlp_cuda  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]

    if not megatron_compat.has_weight_gradient_kernel():
        raise Unavailable("was not found when Megatron-Core was imported")
    return True


def _describe(context: RunContext, row: Row) -> Row:
    named = {"Apex": "added within the product, Apex"}
    return Row(row.operation, named.get(row.name, row.name), row.why, row.refused)


WEIGHT_GRADIENT: Operation[bool] = Operation(
    field="fuse_weight_gradient",
    name="weight gradients",
    reference=lambda context: Implementation("added by Megatron-Core's hook", lambda context: False),
    implementations=[Implementation("Apex", _apex, label="Apex's fused_weight_gradient_mlp_cuda")],
    trial=_trial,
    # In bf16 the gradient is rounded before it is added, or is not.
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=lambda context: context.train,
    describe=_describe,
)
