"""Linear layers that are sharded over the tensor-parallel ranks, as an operation.

Legend: S sequence (this rank's slice), B batch, K inner and N outer dimension of a layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from ops import te
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext
from parallel.sharding import mark
from parallel.tensor_parallel import linear_options


class LinearSpec(NamedTuple):
    """What a linear layer is made of."""

    inner: int
    outer: int
    bias: bool
    config: Any
    """A TransformerConfig, or what `layer_config` returns."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks."""


class LinearLayers(Protocol):
    """Makes layers that return (x @ weight.T, bias or None), the bias not added. They have the parameters `weight`, a
    shard of [N, K], and, with a bias, `bias`."""

    @property
    def has_matmul_ops(self) -> bool:
        """Whether the products are operators of PyTorch, whose results activation checkpointing can keep."""
        ...

    def column(self, spec: LinearSpec, weight: nn.Parameter | None = None) -> Any:
        """N is sharded: [S, B, K] -> [S, B, N / ranks]. Under sequence parallelism x is gathered over the group.

        Args:
            weight: the layer's, which another module has too; None: one of its own.
        """
        ...

    def row(self, spec: LinearSpec) -> Any:
        """K is sharded: [S, B, K / ranks] -> [S, B, N], the sum over the group; under sequence parallelism this rank's
        slice of it."""
        ...

    def replicated(self, spec: LinearSpec) -> Any:
        """Nothing is sharded: every rank multiplies its own tokens, without communication and without a bias."""
        ...


class ReplicatedLinear(nn.Module):
    """LinearLayers.replicated."""

    def __init__(self, spec: LinearSpec):
        super().__init__()
        assert not spec.bias
        self.weight = nn.Parameter(torch.empty(spec.outer, spec.inner, dtype=spec.config.params_dtype))
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.product(x, self.weight), None


class MegatronLayers:
    """Megatron-Core's, which has none that is replicated."""

    has_matmul_ops = True

    def column(self, spec: LinearSpec, weight: nn.Parameter | None = None) -> Any:
        layer = ColumnParallelLinear(
            spec.inner,
            spec.outer,
            gather_output=False,
            bias=spec.bias,
            skip_weight_param_allocation=weight is not None,
            **linear_options(spec.config, spec.group),
        )
        if weight is not None:
            layer.weight = weight
        return layer

    def row(self, spec: LinearSpec) -> Any:
        how = linear_options(spec.config, spec.group)
        return RowParallelLinear(spec.inner, spec.outer, input_is_parallel=True, bias=spec.bias, **how)

    def replicated(self, spec: LinearSpec) -> Any:
        return ReplicatedLinear(spec)


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


def fill(weight: nn.Parameter, whole: Tensor, dim: int | None, context: RunContext) -> nn.Parameter:
    """Sets a parameter to this rank's shard, and gives it what one of a run has: a main gradient, and room to say that
    the gradient was added to it."""
    group = context.groups.tp
    with torch.no_grad():
        weight.copy_(whole if dim is None else whole.chunk(group.size(), dim)[group.rank()])
    mark(weight, main_grad=torch.ones_like(weight, dtype=torch.float32), grad_added_to_main_grad=False)
    return weight


def main_gradient_of(weight: Any, returned: Tensor) -> Tensor:
    """What the buckets would hold after a micro-batch."""
    is_complete = weight.grad_added_to_main_grad and not getattr(weight, "zero_out_wgrad", False)
    return weight.main_grad if is_complete else weight.main_grad + returned


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
    """Every kind of layer that a run has: a column-parallel and a row-parallel one after the other, as wide as
    attention's; one that is replicated; an output layer, whose weight may be the embedding's."""
    model, tp = context.model, context.groups.tp
    how, hidden, width, results = (layer_config(context), tp), model.hidden_size, model.output_width, []
    if multiplies(context):
        column, row = (LinearSpec(*sizes, model.attention_bias, *how) for sizes in ((hidden, width), (width, hidden)))
        results += _two_micro_batches([(layers.column(column), column, 0), (layers.row(row), row, 1)], context)
    if model.mtp_num_layers or (model.kv_lora_rank is not None and multiplies(context)):
        sizes = (2 * hidden, hidden)
        if model.kv_lora_rank is not None:
            sizes = hidden, model.kv_lora_rank + model.qk_rope_head_dim
        spec = LinearSpec(*sizes, False, *how)
        results += _two_micro_batches([(layers.replicated(spec), spec, None)], context)
    if not model.reward_head:
        head, shared = LinearSpec(hidden, min(model.vocab_size, 512 * tp.size()), model.head_bias, *how), None
        if model.ties_head:
            shared = nn.Parameter(context.randn(head.outer // tp.size(), hidden))
            mark(shared, zero_out_wgrad=True)
        results += _two_micro_batches([(layers.column(head, shared), head, 0)], context)
    return results


def _two_micro_batches(chain: Sequence[tuple[Any, LinearSpec, int | None]], context: RunContext) -> list[Tensor]:
    """Of layers one after the other, each with the dimension of its weight that is sharded: results and gradients. The
    second micro-batch adds to the gradients of the first."""
    tp, results = context.groups.tp, []
    tokens, (_, first, _), (_, spec, last) = 8 * tp.size(), chain[0], chain[-1]
    weights = [
        fill(layer.weight, context.randn(s.outer, s.inner, seed=1 + i) / s.inner**0.5, dim, context)
        for i, (layer, s, dim) in enumerate(chain)
    ]
    biases = biases_of([layer for layer, _, _ in chain], spec.bias)
    for seed in (3, 5):
        x_SBK = y_SBN = sequence_shard(context.randn(tokens, 2, first.inner, seed=seed), context).requires_grad_()
        for layer, _, _ in chain:
            y_SBN, b = layer(y_SBN)
            y_SBN = y_SBN if b is None else y_SBN + b
            results.append(y_SBN.detach())
        above = context.randn(tokens, 2, spec.outer, seed=seed + 1)
        above = above.chunk(tp.size(), -1)[tp.rank()] if last == 0 else sequence_shard(above, context)
        dx, *of_weights = torch.autograd.grad(y_SBN, (x_SBK, *weights, *biases), above)
        for weight, returned in zip(weights, of_weights, strict=False):
            mark(weight, main_grad=main_gradient_of(weight, returned), grad_added_to_main_grad=False)
        results += [dx, *of_weights[len(weights) :]]
    return [*results, *(w.main_grad for w in weights)]  # pyright: ignore[reportAttributeAccessIssue]


def multiplies(context: RunContext) -> bool:
    """Whether a transformer layer of a training run has linear layers that are not in FP8."""
    config, model = context.config, context.model
    every = model.num_layers + model.mtp_num_layers
    in_fp8 = len(context.fp8_layers) if config.fp8.linear_layers else 0
    return context.train and in_fp8 < every


def _is_used(context: RunContext) -> bool:
    """The output layer is never in FP8."""
    return multiplies(context) or (context.train and not context.model.reward_head)


def _describe(context: RunContext, row: Row) -> Row:
    if multiplies(context):
        return row
    why = "; ".join(filter(None, [row.why, "of the output layer alone, the others are in FP8"]))
    return Row(row.operation, row.name, why, row.refused)


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
    is_used=_is_used,
    asked=te.asked,
    refusal=f"linear layers: {te.REFUSAL}",
    is_collective=True,
    describe=_describe,
    standard="Megatron-Core's",
)
