"""A layer whose products TransformerEngine computes in FP8 (fp8.kernels=te).

Legend: S sequence (this rank's slice), B batch, K inner and N outer dimension of a linear layer.
"""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from moe.experts import Experts
from ops.experts import LOOP, ExpertBackend
from ops.fp8 import Float8
from ops.implementations import Ops
from ops.linear import ReplicatedLinear
from ops.te_fp8 import Scales, TransformerEngineFp8, trains
from parallel.batch_context import TRAIN, BatchContext
from parallel.megatron_compat import replace_linear_product
from parallel.process_groups import Groups


def around_a_pass(
    fp8: TransformerEngineFp8 | None, layers: Iterable[int], batch_ctx: BatchContext
) -> AbstractContextManager[None]:
    """What the layers of a pipeline chunk run in."""
    if fp8 is None or not any(layer in fp8.layers for layer in layers):
        return contextlib.nullcontext()
    return fp8.around_a_pass(batch_ctx.mode == TRAIN)


def experts_in(ops: Ops, float8: Float8 | None, te_fp8: TransformerEngineFp8 | None) -> ExpertBackend:
    """How the experts of a layer compute."""
    if te_fp8 is not None:
        return te_fp8.experts(LOOP if ops.experts.permutes else ops.experts)
    return float8.experts if float8 else ops.experts


def compute_in_fp8(block: nn.Module, fp8: TransformerEngineFp8, groups: Groups) -> None:
    """Gives TransformerEngine the products of every linear layer and of the experts in `block`, and these what delayed
    scaling keeps."""
    for layer in [*block.modules()]:
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear | ReplicatedLinear):
            scales = Scales(fp8.history, None, (groups.tp,), None) if fp8.history else None
            if scales is not None:
                layer.fp8_state = scales
            product = _product(fp8, layer.weight, scales)
            if isinstance(layer, ReplicatedLinear):
                layer.product = product
            else:
                replace_linear_product(layer, product)
        elif isinstance(layer, Experts):
            for name, weight in (("in", layer.w_in), ("out", layer.w_out)):
                scales = Scales(fp8.history, len(weight), (groups.etp,), groups.ep) if fp8.history else None
                if scales is not None:
                    layer.add_module(f"{name}_scales", nn.ModuleDict({"fp8_state": scales}))
                fp8.grouped(weight, scales)


def _product(fp8: TransformerEngineFp8, weight_NK: Any, scales: Scales | None) -> Callable[..., Tensor]:
    """A product of replace_linear_product, or of a replicated layer; in bf16 outside of training."""
    in_fp8 = fp8.linear(weight_NK, scales)

    def product(x_SBK: Tensor, w_NK: Tensor, gather: bool = False, reduce: bool = False, group: Any = None) -> Tensor:
        if gather:
            x_SBK = gather_from_sequence_parallel_region(x_SBK, tensor_parallel_output_grad=True, group=group)
        elif reduce:
            x_SBK = copy_to_tensor_model_parallel_region(x_SBK, group=group)
        return in_fp8(x_SBK) if trains() else F.linear(x_SBK, w_NK)

    return product
