"""Experts and linear layers as single operations on a GEMM backend (ops/gemm_backend.py): what is computed in which
order, forward and backward, whatever the backend is.

Legend: T tokens, R routed rows grouped by expert, D hidden, F expert hidden, L experts of this rank, G 2 for gated
activations, else 1, S sequence (this rank's slice), B batch, K inner and N outer dimension of a linear layer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops.gemm_backend import GemmBackend, Weight
from ops.permute import PermuteIndices
from parallel.collectives import all_gather, reduce_scatter
from parallel.megatron_compat import replace_linear_product


@dataclass(frozen=True)
class _Kept:
    gemm: GemmBackend
    version: int
    """Changes with every write to the weight that autograd knows of."""
    weight: Weight


def kept_weight(gemm: GemmBackend, w_LKN: Tensor, owner: Tensor) -> Weight:
    """The weight as the backend takes it, kept on its parameter until the next optimizer step (`forget_weights`)."""
    kept = getattr(owner, "kept_weight", None)
    if kept is None or kept.gemm is not gemm or kept.version != owner._version:
        kept = _Kept(gemm, owner._version, gemm.weight(w_LKN.detach()))
        owner.kept_weight = kept  # pyright: ignore[reportAttributeAccessIssue]
    return kept.weight


def forget_weights(module: nn.Module) -> None:
    """Called when the optimizer is about to change the weights, which it does behind autograd's back. Frozen ones stay
    as they are."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            vars(parameter).pop("kept_weight", None)


def expert_weight(gemm: GemmBackend, w: Tensor) -> Weight:
    """Of w_in [L, D, G, F] or w_out [L, F, D], or of some experts' piece of it: kept for all experts at once."""
    whole, experts = getattr(w, "part_of", (w, slice(None)))
    return kept_weight(gemm, whole.flatten(2), whole)[experts]


class ExpertsFunction(torch.autograd.Function):
    """(act(x @ w_in + b_in) * keep) @ w_out of each row's expert (ops.experts.loop_experts). Of the hidden width only h
    is kept for the backward pass. With indices x is [T, D], and its rows are read from where they lie."""

    @staticmethod
    def forward(
        ctx: Any,
        gemm: GemmBackend,
        x_RD: Tensor,
        counts: Sequence[int],
        w_in_LDGF: Tensor,
        w_out_LFD: Tensor,
        activation: str,
        b_in_LGF: Tensor | None = None,
        keep_RF: Tensor | None = None,
        indices: PermuteIndices | None = None,
    ) -> Tensor:
        counts = list(counts)
        groups, row_R = gemm.groups(counts, x_RD.device), None if indices is None else indices.token_R()
        w_in, w_out = expert_weight(gemm, w_in_LDGF), expert_weight(gemm, w_out_LFD)
        h_RN = gemm.product(gemm.rows(x_RD, row_R), w_in.forward, groups, x_RD.dtype)
        h_RGF = h_RN.unflatten(1, w_in_LDGF.shape[2:])
        if b_in_LGF is not None:
            for h, b_in_GF in zip(h_RGF.split(counts), b_in_LGF, strict=True):
                h += b_in_GF
        y_RD = gemm.product(gemm.activate(h_RGF, activation, keep_RF), w_out.forward, groups, x_RD.dtype)
        ctx.save_for_backward(h_RGF, keep_RF, *gemm.columns(x_RD, groups, row_R))
        ctx.gemm, ctx.groups, ctx.activation, ctx.indices, ctx.tokens = gemm, groups, activation, indices, len(x_RD)
        ctx.counts, ctx.has_bias = counts, b_in_LGF is not None
        ctx.weights = w_in_LDGF, w_out_LFD
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        (h_RGF, keep_RF, *x_columns), gemm, groups = ctx.saved_tensors, ctx.gemm, ctx.groups
        w_in_LDGF, w_out_LFD = ctx.weights
        w_in, w_out = expert_weight(gemm, w_in_LDGF), expert_weight(gemm, w_out_LFD)
        da_RF = gemm.product(gemm.rows(dy_RD), w_out.back, groups, dy_RD.dtype)
        a_RF, dh_RN, dh_rows = gemm.activate_back(h_RGF, da_RF, ctx.activation, keep_RF)
        dx = gemm.product(dh_rows, w_in.back, groups, dy_RD.dtype)
        dx = dx if ctx.indices is None else ctx.indices.permute_backward(dx, ctx.tokens)
        dw_in = dw_out = None  # of frozen weights
        if ctx.needs_input_grad[4]:
            dw_out = gemm.weight_gradient(gemm.columns(a_RF, groups), gemm.columns(dy_RD, groups), groups, w_out_LFD)
        if ctx.needs_input_grad[3]:
            dw_in = gemm.weight_gradient(x_columns, gemm.columns(dh_RN, groups), groups, w_in_LDGF)
        db_in = None
        if ctx.has_bias:
            db_in = torch.stack([dh.sum(0) for dh in dh_RN.split(ctx.counts)]).view(-1, *w_in_LDGF.shape[2:])
        return None, dx, None, dw_in, dw_out, None, db_in, None, None


def experts_with(gemm: GemmBackend) -> Callable[..., Tensor]:
    """What an ops.experts.ExpertBackend runs: the arguments of ops.experts.loop_experts and, after these, the
    PermuteIndices of the rows."""
    return functools.partial(ExpertsFunction.apply, gemm)


class LinearFunction(torch.autograd.Function):
    """x @ w.T as a group of its own, with the collectives of Megatron-Core's column-parallel layer: under sequence
    parallelism x is gathered (again in backward, so that the whole sequence is not kept)."""

    @staticmethod
    def forward(
        ctx: Any, x_SBK: Tensor, w_NK: Tensor, gemm: GemmBackend, gather: bool, reduce: bool, group: Any
    ) -> Tensor:
        ctx.save_for_backward(x_SBK)
        ctx.w_NK, ctx.gemm, ctx.gather, ctx.reduce, ctx.group = w_NK, gemm, gather, reduce, group
        whole_SBK = all_gather(x_SBK, group) if gather else x_SBK
        x_RK = whole_SBK.flatten(0, -2)
        groups = gemm.groups([x_RK.shape[0]], x_RK.device)
        weight = kept_weight(gemm, w_NK.t().unsqueeze(0), w_NK)
        y_RN = gemm.product(gemm.rows(x_RK), weight.forward, groups, x_RK.dtype)
        return y_RN.view(*whole_SBK.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SBN: Tensor) -> tuple[Tensor | None, ...]:
        (x_SBK,), gemm, w_NK, group = ctx.saved_tensors, ctx.gemm, ctx.w_NK, ctx.group
        whole_SBK = all_gather(x_SBK, group) if ctx.gather else x_SBK
        x_RK, dy_RN = whole_SBK.flatten(0, -2), dy_SBN.flatten(0, -2)
        groups = gemm.groups([x_RK.shape[0]], x_RK.device)
        weight = kept_weight(gemm, w_NK.t().unsqueeze(0), w_NK)
        dx_SBK = gemm.product(gemm.rows(dy_RN), weight.back, groups, dy_RN.dtype).view(whole_SBK.shape)
        summed = dist.all_reduce(dx_SBK, group=group, async_op=True) if ctx.reduce else None
        dw_NK = None
        if ctx.needs_input_grad[1]:
            dw_NK = gemm.weight_gradient(gemm.columns(dy_RN, groups), gemm.columns(x_RK, groups), groups, w_NK)
        if summed:
            summed.wait()
        return reduce_scatter(dx_SBK, group) if ctx.gather else dx_SBK, dw_NK, None, None, None, None


def linear_with(gemm: GemmBackend) -> Callable[[Tensor, Tensor], Tensor]:
    """(x [..., K], w [N, K]) -> x @ w.T [..., N], on one rank."""
    return lambda x, w: LinearFunction.apply(x, w, gemm, False, False, None)


def use_gemm_backend(module: nn.Module, gemm: GemmBackend) -> None:
    """Gives the products of every tensor-parallel linear layer inside `module` to the backend."""
    replace_linear_product(module, lambda x, w, *how: LinearFunction.apply(x, w, gemm, *how))
