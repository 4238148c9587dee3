"""A norm and the linear layer that reads it as one layer, as an operation: before attention, before dense feed-forward
layers, and between the two projections of latent attention.

Legend: S sequence (this rank's slice), B batch, D hidden or another width that is normalised, K inner and N outer
dimension of a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conf.extensions import input_projections
from conf.schema import ModelConfig
from ops import te
from ops.linear import (
    MEGATRON_LAYERS,
    LinearSpec,
    biases_of,
    fill,
    layer_config,
    main_gradient_of,
    multiplies,
    sequence_shard,
    te_layers,
)
from ops.norm import torch_rms_norm
from ops.operation import Implementation, Operation
from ops.run_context import RunContext


class NormParameters(Protocol):
    """models.norm.RMSNorm, or LayerNorm, which has a bias."""

    weight: nn.Parameter
    eps: float
    zero_centered: bool


class NormLinear(Protocol):
    """Makes a column-parallel layer of what a norm returns."""

    def __call__(self, norm: NormParameters, spec: LinearSpec, *, returns_norm: bool = False) -> Any:
        """The layer shares the norm's parameters, whose names in the model stay the norm's, and takes its input. With
        returns_norm it returns (output, bias or None, what the norm returns), for another layer that reads it."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a model has a norm and such a layer."""

    inner: int
    outer: int
    biased: bool
    layer_norm: bool
    zero_centered: bool
    returns_norm: bool = False
    """A second layer reads the norm: the other projection of a gated feed-forward layer."""


def _places(model: ModelConfig) -> Iterator[Place]:
    """Those that differ. model.recompute=[norm] is to drop what a fused layer keeps, and is about the norms before
    attention and feed-forward layers alone."""
    hidden, of_block = model.hidden_size, (model.norm == "layernorm", model.norm_zero_centered)
    if model.kv_lora_rank is not None:
        up = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
        yield Place(model.kv_lora_rank, up, False, False, False)
        if model.q_lora_rank is not None:
            yield Place(model.q_lora_rank, model.query_width, False, False, False)
    if "norm" in model.recompute:
        return
    if model.kv_lora_rank is None:
        yield Place(hidden, model.qkv_width, model.attention_bias, *of_block)
    if not all(map(model.is_sparse, range(model.num_layers))):
        gated = input_projections(model.activation) == 2
        yield Place(hidden, model.ffn_hidden_size, model.ffn_bias, *of_block, returns_norm=gated)


@dataclass
class _Norm:
    """NormParameters of a trial."""

    weight: nn.Parameter
    eps: float
    zero_centered: bool
    bias: nn.Parameter | None = None


def _trial(fused: NormLinear | None, context: RunContext) -> list[Tensor]:
    """In every place; None: the norm and Megatron-Core's layer, one after the other."""
    return [t for place in _places(context.model) for t in _trial_in(place, fused, context)]


def _trial_in(place: Place, fused: NormLinear | None, context: RunContext) -> list[Tensor]:
    tp, inner, outer, eps = context.groups.tp, place.inner, place.outer, context.model.norm_eps
    tokens = 8 * tp.size()
    weight_D = nn.Parameter(context.randn(inner, seed=6) * 0.1 + (0 if place.zero_centered else 1))
    bias_D = nn.Parameter(context.randn(inner, seed=7)) if place.layer_norm else None
    norm = _Norm(weight_D, eps, place.zero_centered, bias_D)
    spec = LinearSpec(inner, outer, place.biased, layer_config(context), tp)
    layer = MEGATRON_LAYERS.column(spec) if fused is None else fused(norm, spec, returns_norm=place.returns_norm)
    w_NK = fill(layer.weight, context.randn(outer, inner, seed=1) / inner**0.5, 0, context)
    biases = biases_of([layer], place.biased)
    x_SBD = sequence_shard(context.randn(tokens, 2, inner, seed=3), context).requires_grad_()
    gain_D = weight_D + 1 if place.zero_centered else weight_D
    normed = x_SBD
    if fused is None and bias_D is None:
        normed = torch_rms_norm(x_SBD, gain_D, eps)
    elif fused is None:
        normed = nn.functional.layer_norm(x_SBD, gain_D.shape, gain_D, bias_D, eps)
    y, b, *returned = layer(normed)
    y = y if b is None else y + b
    read = [returned[0] if returned else normed] if place.returns_norm else []
    leaves = [x_SBD, weight_D, *([] if bias_D is None else [bias_D]), *biases, w_NK]
    above = [context.randn(tokens, 2, outer, seed=4).chunk(tp.size(), -1)[tp.rank()]]
    above += [sequence_shard(context.randn(tokens, 2, inner, seed=5), context) for _ in read]
    *gradients, dw_NK = torch.autograd.grad([y, *read], leaves, above)
    return [y.detach(), *(t.detach() for t in read), *gradients, main_gradient_of(w_NK, dw_NK)]


def _norm_is_needed(context: RunContext) -> str | None:
    if not any(True for _ in _places(context.model)):
        return "keeps what model.recompute=[norm] is to recompute"
    return None if context.config.lora.rank is None else "hides the output of the norm, which adapters read"


NORM_LINEAR: Operation[NormLinear | None] = Operation(
    field="norm_linear",
    name="norm and linear layer",
    reference=lambda context: Implementation("one after the other", lambda context: None),
    implementations=[
        Implementation(
            te.NAME,
            lambda context: te_layers(context).norm_column,
            device="cuda",
            dtypes=(torch.bfloat16,),
            is_supported=te.is_meant,
            unsupported_reason=_norm_is_needed,
        ),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
    is_used=multiplies,
    asked=te.asked,
    refusal=f"norm and linear layer: {te.REFUSAL}",
    is_collective=True,
    standard="Megatron-Core's",
)
