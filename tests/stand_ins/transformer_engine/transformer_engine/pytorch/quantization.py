"""Stands for transformer_engine.pytorch.quantization: autocast, the state of delayed scaling, and products whose
operands are rounded to FP8 and back.

Legend: R rows, K inner and N outer dimension of a product.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ops.fp8_numerics import quantise
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.products import add_weight_gradient

CAPABILITY = (10, 0)
"""Of the GPU that is pretended."""


class RecipeState:
    def __init__(self, recipe: DelayedScaling, tensors: int):
        self.scale = torch.ones(tensors)
        self.amax_history = torch.zeros(recipe.amax_history_len, tensors)


class FP8GlobalStateManager:
    enabled, recipe, group, depth, first = False, None, None, 0, False
    buffers: ClassVar[dict[tuple[bool, int, int], tuple[DelayedScaling, Any, list[RecipeState]]]] = {}
    reductions = 0
    """How often a group has exchanged amaxes."""

    @classmethod
    def reset(cls) -> None:
        cls.enabled, cls.recipe, cls.group, cls.depth, cls.first, cls.buffers = False, None, None, 0, False, {}

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return (True, "") if CAPABILITY >= (8, 9) else (False, "Device compute capability 8.9 or higher required.")

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        if (10, 0) <= CAPABILITY < (12, 0):
            return True, ""
        return False, "Device compute capability 10.0 or higher required for MXFP8 execution."

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return (True, "") if CAPABILITY >= (9, 0) else (False, "Compute capability 9.0 or higher required.")

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        first, cls.first = cls.first, False
        return first

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool) -> None:
        """Of delayed scaling: the amaxes of all layers, over the group, become the scales of the next pass."""
        for (is_forward, *_), (recipe, group, states) in cls.buffers.items():
            if is_forward != forward:
                continue
            amax = torch.cat([state.amax_history[0] for state in states])
            if recipe.reduce_amax and dist.is_initialized() and dist.get_world_size(group) > 1:
                dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
                cls.reductions += 1
            largest = recipe.fp8_format.value.max_fwd if forward else recipe.fp8_format.value.max_bwd
            for state, new in zip(states, amax.split([len(s.scale) for s in states]), strict=True):
                state.amax_history[0].copy_(new)
                seen = state.amax_history.amax(0) if recipe.amax_compute_algo == "max" else new
                scale = largest / seen / 2**recipe.margin
                state.scale.copy_(torch.where((seen > 0) & scale.isfinite(), scale, state.scale))
                state.amax_history.copy_(state.amax_history.roll(-1, 0))
                state.amax_history[0].zero_()


class autocast:
    def __init__(
        self, enabled: bool = True, calibrating: bool = False, recipe: Any = None, amax_reduction_group: Any = None
    ):
        self.new, self.saved = (enabled, recipe, amax_reduction_group), None

    def __enter__(self) -> "autocast":
        state = FP8GlobalStateManager
        assert self.saved is None, "entered twice"
        self.saved = (state.enabled, state.recipe, state.group, state.first)
        state.enabled, state.recipe, state.group = self.new
        state.first = state.first or state.depth == 0
        state.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        state = FP8GlobalStateManager
        assert self.saved is not None
        state.enabled, state.recipe, state.group, state.first = self.saved
        state.depth -= 1
        self.saved = None
        if self.new[0] and state.depth == 0 and torch.is_grad_enabled():
            state.reduce_and_update_fp8_tensors(forward=True)


def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None
) -> autocast:
    return autocast(enabled, calibrating, fp8_recipe, fp8_group)


class Fp8Module(nn.Module):
    """What layers have of it."""

    def begin(self) -> None:
        self.fp8_meta: dict[str, Any] = {}
        self.fp8_workspaces: dict[int, list[Tensor]] = {}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        recipe, group = FP8GlobalStateManager.recipe, FP8GlobalStateManager.group
        if not isinstance(recipe, DelayedScaling) or "scaling_fwd" in self.fp8_meta:
            return
        for way, tensors in (("fwd", 3 * num_gemms), ("bwd", 2 * num_gemms)):
            state = self.fp8_meta[f"scaling_{way}"] = RecipeState(recipe, tensors)
            key = (way == "fwd", id(recipe), id(group))
            FP8GlobalStateManager.buffers.setdefault(key, (recipe, group, []))[2].append(state)

    def fp8_product(self, x_RK: Tensor, splits: list[int], weights: Sequence[Tensor], first: bool | None) -> Tensor:
        self.init_fp8_metadata(len(weights))
        return _Product.apply(x_RK, splits, self, first, *weights)


def rounded(t: Tensor, module: Fp8Module, recipe: Any, way: str, index: int, *, columns: bool = False) -> Tensor:
    """As FP8 holds it, in fp32.

    Args:
        index: of the tensor among those of the layer.
        columns: for a product whose inner dimension is the first.
    """
    is_e5m2 = way == "bwd" and recipe.fp8_format is Format.HYBRID
    largest, dtype = (57344.0, torch.float8_e5m2) if is_e5m2 else (448.0, torch.float8_e4m3fn)
    per_tensor = isinstance(recipe, DelayedScaling | Float8CurrentScaling)
    multiple = 16 if per_tensor or isinstance(recipe, Float8BlockScaling) else 32
    assert math.prod(t.shape[:-1]) % 8 == 0 == t.shape[-1] % multiple, f"not for FP8: {list(t.shape)}"
    if not per_tensor:
        width = 128 if isinstance(recipe, Float8BlockScaling) else 32
        is_weight = index % 3 == 1 and way == "fwd" and width == 128
        return quantise(t, (128, 128) if is_weight else ((width, 1) if columns else (1, width))).dequantise()
    amax = t.detach().abs().amax().float() if t.numel() else torch.zeros(())
    scale = largest / amax.clamp(min=1e-30)
    if isinstance(recipe, DelayedScaling):
        state = module.fp8_meta[f"scaling_{way}"]
        state.amax_history[0, index] = torch.maximum(state.amax_history[0, index], amax)
        scale = state.scale[index].clone()
    return (t.float() * scale).clamp(-largest, largest).to(dtype).float() / scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, splits: list[int], layer: Any, first: bool | None, *weights: Tensor) -> Tensor:
        recipe = FP8GlobalStateManager.recipe
        ctx.splits, ctx.layer, ctx.recipe, ctx.first, ctx.weights = splits, layer, recipe, first, weights
        ctx.updates = FP8GlobalStateManager.is_first_fp8_module()
        if first is not False:
            layer.fp8_workspaces = {
                i: [rounded(w, layer, recipe, "fwd", 3 * i + 1, columns=columns) for columns in (False, True)]
                for i, w in enumerate(weights)
            }
        ctx.rounded_weights = dict(layer.fp8_workspaces)
        out = []
        for i, x in enumerate(x_RK.split(splits)):
            out.append(rounded(x, layer, recipe, "fwd", 3 * i) @ ctx.rounded_weights[i][0].t())
        ctx.columns = [rounded(x, layer, recipe, "fwd", 3 * i, columns=True) for i, x in enumerate(x_RK.split(splits))]
        return torch.cat(out).to(x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        layer, recipe, grads, dx = ctx.layer, ctx.recipe, [], []
        for i, (dy, w) in enumerate(zip(dy_RN.split(ctx.splits), ctx.weights, strict=True)):
            dx.append(rounded(dy, layer, recipe, "bwd", 2 * i) @ ctx.rounded_weights[i][1])
            dw = None
            if w.requires_grad:
                dw = rounded(dy, layer, recipe, "bwd", 2 * i, columns=True).t() @ ctx.columns[i]
                dw = add_weight_gradient(w, dw, fuse=layer.fuse_wgrad_accumulation, first=ctx.first)
            grads.append(dw)
        if ctx.updates:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return torch.cat(dx).to(dy_RN.dtype), None, None, None, *grads
