"""Products in FP8 by the layers of TransformerEngine (fp8.kernels=te). The weights stay ours: a layer of
TransformerEngine is called with them, and keeps what its recipe needs.

Delayed scaling has a state, scales and the history of the largest magnitudes (amax). `Scales` holds it as parameters
that are set by a rule, so that checkpoints have it under every layout.

Legend: R rows, K inner and N outer dimension of a product, L experts of this rank, S sequence (this rank's slice), B
batch, H length of the history.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.extensions import input_projections
from ops import te_recipes
from ops.experts import ExpertBackend, experts_by, loop_experts
from ops.operation import Implementation, Operation, Row
from ops.run_context import RunContext
from parallel import batch_context
from parallel.sharding import set_sharding

FORWARD, BACKWARD = 3, 2
"""FP8 tensors of a product: input, weight and output; the gradients of output and input."""


class Scales(nn.Module):
    """What delayed scaling keeps of one layer: a scale, and the history of amaxes, of each of its FP8 tensors. All
    ranks of a pipeline stage have the same, since they reduce the amaxes; so have experts at one place of their
    ranks."""

    def __init__(
        self, history: int, experts: int | None, groups: tuple[dist.ProcessGroup, ...], ep: dist.ProcessGroup | None
    ):
        """Args:
        experts: of this rank; None: the layer is not one of experts.
        groups: whose ranks all hold the same, besides the data-parallel ones.
        ep: over which the experts are sharded.
        """
        super().__init__()
        of = () if experts is None else (experts,)
        for way, tensors in (("fwd", FORWARD), ("bwd", BACKWARD)):
            scale, amax = torch.ones(*of, tensors), torch.zeros(history, *of, tensors)
            for name, values, std, axis in (("scale", scale, None, 0), ("amax", amax, 0.0, 1)):
                cut = [] if ep is None else [(axis, ep)]
                kept = nn.Parameter(values, requires_grad=False)
                set_sharding(kept, *cut, replicas=groups, std=std, is_state=True)
                kept.allreduce = ep is None  # pyright: ignore[reportAttributeAccessIssue]
                self.register_parameter(f"{name}_{way}", kept)

    def give_to(self, layer: Any) -> None:
        """Makes these the layer's own: from now on both are the same memory."""
        for way in ("fwd", "bwd"):
            state = layer.fp8_meta[f"scaling_{way}"]
            for name, theirs in (("scale", state.scale), ("amax", state.amax_history)):
                kept: nn.Parameter = getattr(self, f"{name}_{way}")
                theirs.copy_(kept.view(theirs.shape))
                kept.data = theirs.view(kept.shape)


class Held:
    """A layer of TransformerEngine without weights of its own: every call brings them. It keeps the weights in FP8
    from the first micro-batch of a step on."""

    def __init__(self, layer: Any, gemms: int, scales: Scales | None):
        self.layer, self.gemms, self.scales = layer, gemms, scales
        self.is_bound, self.is_first = scales is None, True

    def __call__(self, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
        if not self.is_bound:
            assert self.scales is not None
            self.layer.init_fp8_metadata(num_gemms=self.gemms)
            self.scales.give_to(self.layer)
            self.is_bound = True
        first, self.is_first = self.is_first, False
        return torch.func.functional_call(self.layer, weights, inputs, {"is_first_microbatch": first})


def _without_weights(kind: str, weight: Tensor, *sizes: int, **further: Any) -> Any:
    """One of TransformerEngine's layers, for weights like this one."""
    make = getattr(te_recipes.engine(), kind)
    return make(*sizes, bias=False, params_dtype=weight.dtype, device="meta", **further)


def _keep(weight: Any, held: Held) -> Held:
    weight.te_held = held
    return held


@dataclass(frozen=True)
class TransformerEngineFp8:
    """How the layers in FP8 compute; models.te_layers gives it to them."""

    recipe: Any
    """Of transformer_engine.common.recipe."""
    group: dist.ProcessGroup | None
    """Whose ranks have the same scales: those of a pipeline stage. None: the recipe keeps no scales."""
    layers: range
    """Counted from 0 over the whole model."""
    history: int
    """Length of the history of amaxes; 0: the recipe keeps none."""
    rows: int
    """Rows of an expert are padded to multiples of it."""
    fuse: bool
    """Whether linear layers add the gradient of their weight to its main gradient."""

    def around_a_pass(self, training: bool) -> AbstractContextManager[None]:
        """What all layers of a forward pass run in."""
        return te_recipes.reduced_at_the_end(self.recipe, self.group, on=training and self.history > 0)

    def inside(self) -> AbstractContextManager[None]:
        """What a product runs in. Of delayed scaling it is the autocast around the pass: in one of its own, every layer
        would take itself for the first of the pass, after whose backward pass the amaxes are reduced."""
        return contextlib.nullcontext() if self.history else te_recipes.autocast(self.recipe, None)

    def outside(self) -> AbstractContextManager[None]:
        """What a layer runs in that is not in FP8."""
        return te_recipes.autocast(self.recipe, self.group, enabled=False) if self.history else contextlib.nullcontext()

    def linear(self, weight_NK: Tensor, scales: Scales | None) -> Callable[[Tensor], Tensor]:
        """x [..., K] -> x @ weight.T [..., N]."""
        outer, inner = weight_NK.shape
        layer = _without_weights("Linear", weight_NK, inner, outer, fuse_wgrad_accumulation=self.fuse)
        held = _keep(weight_NK, Held(layer, 1, scales))

        def product(x: Tensor) -> Tensor:
            with self.inside():
                return held({"weight": weight_NK}, x)

        return product

    def grouped(self, w_LKN: Tensor, scales: Scales | None) -> Held:
        """Of experts' weights [L, K, ...]; kept on the parameter."""
        sizes = w_LKN.flatten(2).shape
        return _keep(w_LKN, Held(_without_weights("GroupedLinear", w_LKN, *sizes), sizes[0], scales))

    def experts(self, otherwise: ExpertBackend) -> ExpertBackend:
        """Experts whose weights have what `grouped` returns.

        Args:
            otherwise: what computes outside of training.
        """
        return ExpertBackend(partial(_experts, self, otherwise))


def trains() -> bool:
    """Whether a pass of training is computed now, or recomputed."""
    now = batch_context.current()
    return now is not None and now.mode == batch_context.TRAIN


def forget_held(module: nn.Module) -> None:
    """Called when the optimizer is about to change the weights."""
    for parameter in module.parameters():
        held: Held | None = getattr(parameter, "te_held", None)
        if held is not None and parameter.requires_grad:
            held.is_first = True


def _experts(
    fp8: TransformerEngineFp8,
    otherwise: ExpertBackend,
    x_RD: Tensor,
    counts: Sequence[int],
    w_in_LDGF: Tensor,
    w_out_LFD: Tensor,
    activation: str,
    b_in_LGF: Tensor | None = None,
    keep_RF: Tensor | None = None,
) -> Tensor:
    """As loop_experts."""
    how = activation, b_in_LGF
    if not trains():
        return otherwise.run(x_RD, counts, w_in_LDGF, w_out_LFD, *how, keep_RF)
    padded = [-(-n // fp8.rows) * fp8.rows for n in counts]
    if not sum(padded):  # every rank takes part in the exchange of amaxes
        padded[0] = fp8.rows
    row_R = _places(counts, padded, x_RD.device)

    def spread(t_RX: Tensor) -> Tensor:
        return t_RX.new_zeros((sum(padded), *t_RX.shape[1:])).index_copy(0, row_R, t_RX)

    keep_RF = None if keep_RF is None else spread(keep_RF)
    layers: Iterator[Held] = iter([w.te_held for w in (w_in_LDGF, w_out_LFD)])  # pyright: ignore[reportAttributeAccessIssue]

    def product(x_RK: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
        # TransformerEngine has the outer dimension of a weight first; autograd brings the gradient back. A view serves:
        # the layer reads its values when it quantizes, in the first micro-batch of a step, and copies them for that.
        weights = {f"weight{e}": w_KN.t() for e, w_KN in enumerate(w.flatten(2).unbind(0))}
        return next(layers)(weights, x_RK, list(counts))

    with fp8.inside():
        y_RD = experts_by(product, spread(x_RD), padded, w_in_LDGF, w_out_LFD, *how, keep_RF)
    return y_RD.index_select(0, row_R)


def _places(counts: Sequence[int], padded: Sequence[int], device: torch.device) -> Tensor:
    """int64 [R]: where each row is among those padded."""
    starts = [sum(padded[:e]) for e in range(len(padded))]
    places = [torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
    return torch.cat(places).to(device, non_blocking=True)


def _load(context: RunContext) -> TransformerEngineFp8:
    fp8 = context.config.fp8
    recipe = te_recipes.make(fp8)
    delayed = fp8.recipe == "delayed"
    return TransformerEngineFp8(
        recipe,
        context.groups.amax if delayed else None,
        context.fp8_layers,
        fp8.amax_history_len if delayed else 0,
        32 if fp8.recipe == "mxfp8" else 16,
        context.config.optim.grad_dtype == "fp32",
    )


def _trial(fp8: TransformerEngineFp8 | None, context: RunContext) -> list[Tensor]:
    """Results and gradients of two micro-batches of a linear layer, of latent attention the one with the oddest width,
    and with experts of four of them, of which one has no row: after the first, delayed scaling has scales. The main
    gradients are those of both."""
    model, hidden = context.model, context.model.hidden_size
    outer = hidden if model.kv_lora_rank is None else model.kv_lora_rank + model.qk_rope_head_dim
    x_RK, dy_RN = context.randn(64, hidden).requires_grad_(), context.randn(64, outer, seed=2)
    w_NK = nn.Parameter(context.randn(outer, hidden, seed=1) / hidden**0.5)
    main_NK = torch.zeros_like(w_NK, dtype=torch.float32)
    w_NK.main_grad, w_NK.grad_added_to_main_grad = main_NK, False  # pyright: ignore[reportAttributeAccessIssue]
    product = (lambda x: x @ w_NK.t()) if fp8 is None else fp8.linear(w_NK, None)
    around = (lambda: contextlib.nullcontext()) if fp8 is None else (lambda: fp8.around_a_pass(True))
    results: list[Tensor] = []
    with batch_context.entered(batch_context.DEFAULT_CONTEXT):
        for _ in range(2):
            with around():
                y_RN = product(x_RK)
            dx_RK, dw_NK = torch.autograd.grad(y_RN, (x_RK, w_NK), dy_RN)
            if not w_NK.grad_added_to_main_grad:  # pyright: ignore[reportAttributeAccessIssue]
                main_NK.add_(dw_NK)
            results = [y_RN.detach(), dx_RK, main_NK]
        if context.model.moe.num_experts:
            results += _experts_trial(fp8, around, context)
    if fp8 is not None:
        te_recipes.forget_layers()
    return results


def _experts_trial(
    fp8: TransformerEngineFp8 | None, around: Callable[[], AbstractContextManager[None]], context: RunContext
) -> list[Tensor]:
    model, counts = context.model, [33, 0, 1, 62]
    hidden, width = model.hidden_size, model.expert_width // context.groups.etp.size()
    x_RD, w_out = context.randn(96, hidden), context.randn(4, width, hidden, seed=2) / width**0.5
    w_in = context.randn(4, hidden, input_projections(model.activation), width, seed=1) / hidden**0.5
    leaves = [nn.Parameter(t) for t in (x_RD, w_in, w_out)]
    run = loop_experts
    if fp8 is not None:
        run = fp8.experts(ExpertBackend(loop_experts)).run
        for w in leaves[1:]:
            fp8.grouped(w, None)
    results: list[Tensor] = []
    for _ in range(2):
        with around():
            y_RD = run(leaves[0], counts, leaves[1], leaves[2], model.activation_name)
        results = [y_RD.detach(), *torch.autograd.grad(y_RD, leaves, context.randn(96, hidden, seed=5))]
    return results


def _describe(context: RunContext, row: Row) -> Row:
    fp8, layers = context.config.fp8, context.fp8_layers
    every = context.model.num_layers + context.model.mtp_num_layers
    which = "every layer" if len(layers) == every else f"layers {layers[0]} to {layers[-1]}"
    name = f"TransformerEngine {te_recipes.version()}, {fp8.recipe}, {te_recipes.number_format(fp8)}"
    why = f"{which}, in training; evaluation in bf16; asked for; close to bf16 on a random batch"
    return Row(row.operation, name, why, row.refused)


TE_FP8: Operation[TransformerEngineFp8 | None] = Operation(
    field="te_fp8",
    name="FP8 products",
    reference=lambda context: Implementation("bf16", lambda context: None),
    implementations=[Implementation("te", _load, label="TransformerEngine")],
    trial=_trial,
    # E4M3 has 4 significant bits, E5M2 3: products of rounded operands are off by 4 to 6 %, experts' by up to 9 %.
    tolerance={torch.float32: 0.12, torch.bfloat16: 0.12},
    is_used=lambda context: context.config.precision == "fp8" and context.config.fp8.kernels == "te",
    setting="fp8.kernels",
    refusal="fp8.kernels=te: {reason}. Our own kernels: fp8.kernels=auto",
    must_run=lambda context: True,
    is_collective=True,
    describe=_describe,
    standard="bf16",
)
