"""What precision=fp8 replaces in the model, and with which kernels."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ops.experts import EXPERTS, ExpertBackend, activation_missing
from ops.fp8_numerics import RECIPES, Recipe
from ops.gemm_backend import GemmBackend, Reference
from ops.gpu import FP8_CAPABILITY, triton_unsupported_reason
from ops.grouped_mlp import linear_with
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext


@dataclass(frozen=True)
class Float8:
    experts: ExpertBackend
    linear: GemmBackend | None
    """For the linear layers of attention, dense and shared feed-forward layers; None: they stay in bf16."""
    layers: range
    """The layers in FP8, counted from 0 over the whole model."""


def _float8(context: RunContext, experts: GemmBackend, linear: GemmBackend) -> Float8:
    fp8 = context.config.fp8
    return Float8(ExpertBackend.on(experts), linear if fp8.linear_layers else None, context.fp8_layers)


def _numerics(context: RunContext) -> tuple[Recipe, bool]:
    """(recipe, whether operands of the weight gradient are in FP8 as well)."""
    return RECIPES[context.config.fp8.recipe], context.config.fp8.weight_gradient == "fp8"


def _emulated(context: RunContext) -> Float8:
    recipe, narrow = _numerics(context)
    return _float8(context, *[Reference(recipe, narrow_weight_gradient=narrow)] * 2)


def _triton(context: RunContext) -> Float8:
    from ops.triton.gemm_backend import Float8GemmBackend

    recipe, narrow = _numerics(context)
    return _float8(context, *[Float8GemmBackend(recipe, narrow_weight_gradient=narrow)] * 2)


def _scaled_mm(context: RunContext) -> Float8:
    from ops.triton.scaled_mm import ScaledMmBackend

    recipe, narrow = _numerics(context)
    return replace(_triton(context), linear=ScaledMmBackend(recipe, narrow_weight_gradient=narrow))


def _trial(float8: Float8, context: RunContext) -> list[Tensor]:
    """Experts, and linear layers of rows and blocks that are no multiples of four, where layouts of scales begin to
    differ."""
    results = [*EXPERTS.trial(float8.experts, context)] if context.model.moe.num_experts else []
    if float8.linear is None:
        return results
    for inner, outer in ((384, 256), (context.model.hidden_size, context.model.hidden_size)):
        x_RN, w_NK = context.randn(150, inner), context.randn(outer, inner, seed=1) / inner**0.5
        leaves = [x_RN.requires_grad_(), w_NK.requires_grad_()]
        y_RN = linear_with(float8.linear)(*leaves)
        results += [y_RN.detach(), *torch.autograd.grad(y_RN, leaves, context.randn(150, outer, seed=2))]
    return results


NAMES = {
    "reference": "emulated by rounding operands",
    "scaled_mm": "experts on Triton, linear layers on torch's scaled_mm",
    "triton": "Triton",
}
"""Of the implementations, in the start table."""
VERIFIED = "the GPU has FP8 products, and they equal the reference's on a random batch"


def _describe(context: RunContext, row: Row) -> Row:
    fp8, layers = context.config.fp8, context.fp8_layers
    gradient = "" if fp8.weight_gradient == "fp8" else ", weight gradients in bf16"
    every = context.model.num_layers + context.model.mtp_num_layers
    which = "every layer" if len(layers) == every else f"layers {layers[0]} to {layers[-1]}"
    which = which if fp8.linear_layers else f"the experts of {which}"
    name = NAMES.get(row.name, row.name)
    name = f"experts and linear layers on {name}" if row.name == "triton" and row.refused else name
    why = f"asked for; {VERIFIED}" if row.why == "asked for" and row.name == "triton" else row.why
    return replace(row, name=f"{name}, {fp8.recipe}{gradient}", why=f"{which}; {why}")


def _unsupported_reason(context: RunContext) -> str | None:
    return triton_unsupported_reason(context.device, FP8_CAPABILITY) or activation_missing(context)


FLOAT8 = Operation(
    field="float8",
    name="FP8 products",
    reference=lambda context: Implementation("reference", _emulated, "a CPU has no FP8 products"),
    implementations=[
        Implementation(
            "scaled_mm",
            _scaled_mm,
            VERIFIED,
            device="cuda",
            is_supported=lambda context: context.config.fp8.linear_layers,
            unsupported_reason=_unsupported_reason,
            label="torch's scaled_mm",
        ),
        Implementation("triton", _triton, VERIFIED, device="cuda", unsupported_reason=_unsupported_reason),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-4, torch.bfloat16: 1e-2},
    is_used=lambda context: context.config.precision == "fp8" and context.config.fp8.kernels != "te",
    setting="fp8.kernels",
    refusal="precision=fp8 {reason}. Use precision=bf16, or fp8.kernels=reference to emulate FP8",
    must_run=lambda context: context.device.type == "cuda" and context.config.fp8.kernels != "reference",
    describe=_describe,
    standard="the reference",
)
