"""Linear layers that are sharded over the tensor-parallel ranks, alone and after a norm, as operations.

Legend: S sequence (this rank's slice), B batch, K inner and N outer dimension of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from ops import te
from ops.norm import torch_rms_norm
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


class NormParameters(Protocol):
    """models.norm.RMSNorm, or LayerNorm, which has a bias."""

    weight: nn.Parameter
    eps: float
    zero_centered: bool


class NormLinear(Protocol):
    """Makes a column-parallel layer of what a norm returns."""

    def __call__(
        self, norm: NormParameters, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup
    ) -> Any:
        """The layer shares the norm's parameters, whose names in the model stay the norm's, and takes its input."""
        ...


@dataclass
class _Norm:
    """NormParameters of a trial."""

    weight: nn.Parameter
    eps: float
    zero_centered: bool
    bias: nn.Parameter | None = None


def _config(context: RunContext) -> ModelParallelConfig:
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


def _fill(weight: nn.Parameter, whole: Tensor, dim: int, context: RunContext) -> nn.Parameter:
    """Sets a parameter to this rank's shard, and gives it what one of a run has: a main gradient, and room to say that
    the gradient was added to it."""
    group = context.groups.tp
    with torch.no_grad():
        weight.copy_(whole.chunk(group.size(), dim)[group.rank()])
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    weight.grad_added_to_main_grad = False  # pyright: ignore[reportAttributeAccessIssue]
    return weight


def _gradient(weight: Any, returned: Tensor) -> Tensor:
    """What the buckets would hold after a micro-batch."""
    return weight.main_grad if weight.grad_added_to_main_grad else weight.main_grad + returned


def _sequence_shard(x_SBK: Tensor, context: RunContext) -> Tensor:
    """This rank's slice of the sequence, where it holds one."""
    tp = context.groups.tp
    return x_SBK.chunk(tp.size())[tp.rank()] if context.runtime.layout.sequence_parallel else x_SBK


def _biases(layers: Sequence[Any], biased: bool) -> list[nn.Parameter]:
    for layer in layers if biased else ():
        with torch.no_grad():
            layer.bias.fill_(0.5)
    return [layer.bias for layer in layers] if biased else []


def _trial(layers: LinearLayers, context: RunContext) -> list[Tensor]:
    """A column-parallel layer and a row-parallel one, as wide as attention's, one after the other: twice, since the
    second micro-batch adds to the gradients of the first."""
    model, tp, biased = context.model, context.groups.tp, context.model.attention_bias
    hidden, width, tokens, results = model.hidden_size, model.output_width, 8 * tp.size(), []
    how = biased, _config(context), tp
    column, row = layers.column(hidden, width, *how), layers.row(width, hidden, *how)
    w_NK = _fill(column.weight, context.randn(width, hidden, seed=1) / hidden**0.5, 0, context)
    w_KN = _fill(row.weight, context.randn(hidden, width, seed=2) / width**0.5, 1, context)
    biases = _biases((column, row), biased)
    for seed in (3, 5):
        x_SBD = _sequence_shard(context.randn(tokens, 2, hidden, seed=seed), context).requires_grad_()
        h, b = column(x_SBD)
        h = h if b is None else h + b
        y_SBD, b = row(h)
        y_SBD = y_SBD if b is None else y_SBD + b
        above = _sequence_shard(context.randn(tokens, 2, hidden, seed=seed + 1), context)
        dx, *of_weights = torch.autograd.grad(y_SBD, (x_SBD, w_NK, w_KN, *biases), above)
        for weight, returned in zip((w_NK, w_KN), of_weights, strict=False):
            weight.main_grad = _gradient(weight, returned)  # pyright: ignore[reportAttributeAccessIssue]
            weight.grad_added_to_main_grad = False  # pyright: ignore[reportAttributeAccessIssue]
        results += [h.detach(), y_SBD.detach(), dx, *of_weights[2:]]
    return [*results, *(w.main_grad for w in (w_NK, w_KN))]  # pyright: ignore[reportAttributeAccessIssue]


def _norm_trial(fused: NormLinear | None, context: RunContext) -> list[Tensor]:
    """Of queries, keys and values; None: the norm and Megatron-Core's layer, one after the other."""
    model, tp, biased = context.model, context.groups.tp, context.model.attention_bias
    hidden, width, tokens = model.hidden_size, model.qkv_width, 8 * tp.size()
    weight_D = nn.Parameter(context.randn(hidden, seed=6) * 0.1 + (0 if model.norm_zero_centered else 1))
    bias_D = nn.Parameter(context.randn(hidden, seed=7)) if model.norm == "layernorm" else None
    norm = _Norm(weight_D, model.norm_eps, model.norm_zero_centered, bias_D)
    how = biased, _config(context), tp
    layer = fused(norm, hidden, width, *how) if fused else MEGATRON_LAYERS.column(hidden, width, *how)
    w_NK = _fill(layer.weight, context.randn(width, hidden, seed=1) / hidden**0.5, 0, context)
    biases = _biases([layer], biased)
    x_SBD = _sequence_shard(context.randn(tokens, 2, hidden, seed=3), context).requires_grad_()
    gain_D = weight_D + 1 if model.norm_zero_centered else weight_D
    normed = x_SBD
    if fused is None and bias_D is None:
        normed = torch_rms_norm(x_SBD, gain_D, model.norm_eps)
    elif fused is None:
        normed = nn.functional.layer_norm(x_SBD, gain_D.shape, gain_D, bias_D, model.norm_eps)
    y, b = layer(normed)
    y = y if b is None else y + b
    leaves = [x_SBD, weight_D, *([] if bias_D is None else [bias_D]), *biases, w_NK]
    above = context.randn(tokens, 2, width, seed=4).chunk(tp.size(), -1)[tp.rank()]
    *gradients, returned = torch.autograd.grad(y, leaves, above)
    return [y.detach(), *gradients, _gradient(w_NK, returned)]


def multiplies(context: RunContext) -> bool:
    """Whether a layer of a training run has linear layers that are not in FP8."""
    config, model = context.config, context.model
    every = model.num_layers + model.mtp_num_layers
    in_fp8 = len(context.fp8_layers) if config.fp8.linear_layers else 0
    return context.train and in_fp8 < every


def fuses_norm(context: RunContext) -> bool:
    """Whether a layer of the model takes the output of a norm that nothing else takes, and nothing keeps."""
    return multiplies(context) and context.model.kv_lora_rank is None


def _norm_is_needed(context: RunContext) -> str | None:
    if "norm" in context.model.recompute:
        return "keeps what model.recompute=[norm] is to recompute"
    return None if context.config.lora.rank is None else "hides the output of the norm, which adapters read"


def _te(context: RunContext) -> Any:
    from ops.te_linear import TeLayers

    return te.load(lambda: TeLayers(fuse=context.config.optim.grad_dtype == "fp32"))


LINEAR: Operation[LinearLayers] = Operation(
    field="linear",
    name="linear layers",
    reference=lambda context: Implementation("Megatron-Core", lambda context: MEGATRON_LAYERS),
    implementations=[
        Implementation(te.NAME, _te, device="cuda", dtypes=(torch.bfloat16,), is_supported=te.is_meant),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=multiplies,
    asked=te.asked,
    refusal=f"linear layers: {te.REFUSAL}",
    is_collective=True,
    standard="Megatron-Core's",
)

NORM_LINEAR: Operation[NormLinear | None] = Operation(
    field="norm_linear",
    name="norm and linear layer",
    reference=lambda context: Implementation("one after the other", lambda context: None),
    implementations=[
        Implementation(
            te.NAME,
            lambda context: _te(context).norm_column,
            device="cuda",
            dtypes=(torch.bfloat16,),
            is_supported=te.is_meant,
            unsupported_reason=_norm_is_needed,
        ),
    ],
    trial=_norm_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=fuses_norm,
    asked=te.asked,
    refusal=f"norm and linear layer: {te.REFUSAL}",
    is_collective=True,
    standard="Megatron-Core's",
)
