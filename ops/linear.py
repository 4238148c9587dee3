"""Linear layers that are sharded over the tensor-parallel ranks, as an operation.

Legend: S sequence (this rank's slice), B batch, K inner and N outer dimension of a layer.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from ops import te
from ops.operation import Implementation, Operation
from ops.run_context import RunContext
from parallel.tensor_parallel import linear_options


class LinearLayers(Protocol):
    """Makes layers that return (x @ weight.T, bias or None), the bias not added. They have the parameters `weight`, a
    shard of [N, K], and, with a bias, `bias`."""

    @property
    def has_matmul_ops(self) -> bool:
        """Whether the products are operators of PyTorch, whose results activation checkpointing can keep."""
        ...

    def column(self, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup) -> Any:
        """N is sharded: [S, B, K] -> [S, B, N / ranks]. Under sequence parallelism x is gathered over the group."""
        ...

    def row(self, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup) -> Any:
        """K is sharded: [S, B, K / ranks] -> [S, B, N], the sum over the group; under sequence parallelism this rank's
        slice of it."""
        ...


class MegatronLayers:
    """Megatron-Core's."""

    has_matmul_ops = True

    def column(self, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup) -> Any:
        return ColumnParallelLinear(inner, outer, gather_output=False, bias=bias, **linear_options(config, group))

    def row(self, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup) -> Any:
        return RowParallelLinear(inner, outer, input_is_parallel=True, bias=bias, **linear_options(config, group))


MEGATRON_LAYERS = MegatronLayers()


def layer_config(context: RunContext) -> ModelParallelConfig:
    """What the layers read of a TransformerConfig."""
    layout = context.runtime.layout
    return ModelParallelConfig(
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=context.dtype,
        bf16=context.dtype == torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=context.config.train.deterministic,
    )


def fill(weight: nn.Parameter, whole: Tensor, dim: int, context: RunContext) -> nn.Parameter:
    """Sets a parameter to this rank's shard, and gives it what one of a run has: a main gradient, and room to say that
    the gradient was added to it."""
    group = context.groups.tp
    with torch.no_grad():
        weight.copy_(whole.chunk(group.size(), dim)[group.rank()])
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    weight.grad_added_to_main_grad = False  # pyright: ignore[reportAttributeAccessIssue]
    return weight


def main_gradient_of(weight: Any, returned: Tensor) -> Tensor:
    """What the buckets would hold after a micro-batch."""
    return weight.main_grad if weight.grad_added_to_main_grad else weight.main_grad + returned


def sequence_shard(x_SBK: Tensor, context: RunContext) -> Tensor:
    """This rank's slice of the sequence, where it holds one."""
    tp = context.groups.tp
    return x_SBK.chunk(tp.size())[tp.rank()] if context.runtime.layout.sequence_parallel else x_SBK


def biases_of(layers: Sequence[Any], biased: bool) -> list[nn.Parameter]:
    for layer in layers if biased else ():
        with torch.no_grad():
            layer.bias.fill_(0.5)
    return [layer.bias for layer in layers] if biased else []


def _trial(layers: LinearLayers, context: RunContext) -> list[Tensor]:
    """A column-parallel layer and a row-parallel one, as wide as attention's, one after the other: twice, since the
    second micro-batch adds to the gradients of the first."""
    model, tp, biased = context.model, context.groups.tp, context.model.attention_bias
    hidden, width, tokens, results = model.hidden_size, model.output_width, 8 * tp.size(), []
    how = biased, layer_config(context), tp
    column, row = layers.column(hidden, width, *how), layers.row(width, hidden, *how)
    w_NK = fill(column.weight, context.randn(width, hidden, seed=1) / hidden**0.5, 0, context)
    w_KN = fill(row.weight, context.randn(hidden, width, seed=2) / width**0.5, 1, context)
    biases = biases_of((column, row), biased)
    for seed in (3, 5):
        x_SBD = sequence_shard(context.randn(tokens, 2, hidden, seed=seed), context).requires_grad_()
        h, b = column(x_SBD)
        h = h if b is None else h + b
        y_SBD, b = row(h)
        y_SBD = y_SBD if b is None else y_SBD + b
        above = sequence_shard(context.randn(tokens, 2, hidden, seed=seed + 1), context)
        dx, *of_weights = torch.autograd.grad(y_SBD, (x_SBD, w_NK, w_KN, *biases), above)
        for weight, returned in zip((w_NK, w_KN), of_weights, strict=False):
            weight.main_grad = main_gradient_of(weight, returned)  # pyright: ignore[reportAttributeAccessIssue]
            weight.grad_added_to_main_grad = False  # pyright: ignore[reportAttributeAccessIssue]
        results += [h.detach(), y_SBD.detach(), dx, *of_weights[2:]]
    return [*results, *(w.main_grad for w in (w_NK, w_KN))]  # pyright: ignore[reportAttributeAccessIssue]


def multiplies(context: RunContext) -> bool:
    """Whether a layer of a training run has linear layers that are not in FP8."""
    config, model = context.config, context.model
    every = model.num_layers + model.mtp_num_layers
    in_fp8 = len(context.fp8_layers) if config.fp8.linear_layers else 0
    return context.train and in_fp8 < every


def te_layers(context: RunContext) -> Any:
    """TransformerEngine's, ops.te_linear.TeLayers."""
    from ops.te_linear import TeLayers

    return te.load(lambda: TeLayers(fuse=context.config.optim.grad_dtype == "fp32"))


LINEAR: Operation[LinearLayers] = Operation(
    field="linear",
    name="linear layers",
    reference=lambda context: Implementation("Megatron-Core", lambda context: MEGATRON_LAYERS),
    implementations=[
        Implementation(te.NAME, te_layers, device="cuda", dtypes=(torch.bfloat16,), is_supported=te.is_meant),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=multiplies,
    asked=te.asked,
    refusal=f"linear layers: {te.REFUSAL}",
    is_collective=True,
    standard="Megatron-Core's",
)
