"""Experts with low-rank adapters: act(x @ w_in + s * x @ a_in @ b_in + b) @ w_out + s * act @ a_out @ b_out of each
row's expert, where w_in and w_out get no gradient.

Legend: R routed rows grouped by expert, D hidden, F expert hidden, L experts of this rank, G 2 for gated activations,
else 1, K inner and N outer dimension of a product, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.activations import activate
from ops.gemm_backend import GemmBackend
from ops.grouped_mlp import expert_weight

Product = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""(x [R, K], w [L, K, ...], counts) -> [R, N]: each expert's rows times its weight, whose last dimensions are
flattened to N. Only x may get a gradient."""


@dataclass(frozen=True)
class Factors:
    """A low-rank update of one projection of every expert."""

    a_LKr: Tensor
    b_LrN: Tensor
    scale: float
    keep_RK: Tensor | None = None
    """What its input is multiplied by (dropout)."""

    def update(self, x_RK: Tensor, counts: Sequence[int]) -> Tensor:
        """[R, N]."""
        x_RK = x_RK if self.keep_RK is None else x_RK * self.keep_RK
        return loop_product(loop_product(x_RK, self.a_LKr, counts) * self.scale, self.b_LrN, counts)


def loop_product(x_RK: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """A Product: one after the other. Both arguments may get gradients."""
    parts = zip(x_RK.split(list(counts)), w.flatten(2).unbind(0), strict=True)
    return torch.cat([x @ w_KN for x, w_KN in parts])


class _FrozenProduct(torch.autograd.Function):
    """A Product by a GEMM backend, in its precision."""

    @staticmethod
    def forward(ctx: Any, gemm: GemmBackend, x_RK: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.gemm, ctx.w, ctx.groups = gemm, w, gemm.groups(list(counts), x_RK.device)
        return gemm.product(gemm.rows(x_RK), expert_weight(gemm, w).forward, ctx.groups, x_RK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        gemm = ctx.gemm
        weight = expert_weight(gemm, ctx.w)
        return None, gemm.product(gemm.rows(dy_RN.contiguous()), weight.back, ctx.groups, dy_RN.dtype), None, None


def frozen_product(gemm: GemmBackend) -> Product:
    """The Product of a GEMM backend."""
    return partial(_FrozenProduct.apply, gemm)


@dataclass(frozen=True)
class Adapted:
    """Experts with adapters. What they add aside, each kind computes the same bits as without them."""

    product: Product = loop_product
    """Of the weights. loop_product: everything is computed for one expert after the other."""
    activates_in_fp32: bool = False
    """Whether the activation is computed in fp32 and rounded once, as GEMM backends do."""

    def __call__(
        self,
        x_RD: Tensor,
        counts: Sequence[int],
        w_in_LDGF: Tensor,
        w_out_LFD: Tensor,
        activation: str,
        b_in_LGF: Tensor | None,
        keep_RF: Tensor | None,
        into: Sequence[Factors | None],
        out: Factors | None,
    ) -> Tensor:
        """y [R, D].

        Args:
            b_in_LGF, keep_RF: as in ops.experts.loop_experts.
            into: of each input projection; None: it has no adapter.
            out: of the output projection.
        """
        if self.product is not loop_product and x_RD.shape[0]:  # a grouped product needs a row
            return self._rows(x_RD, counts, w_in_LDGF, w_out_LFD, activation, b_in_LGF, keep_RF, into, out)
        counts = list(counts)
        biases = [None] * len(counts) if b_in_LGF is None else b_in_LGF.split(1)
        keeps = [None] * len(counts) if keep_RF is None else keep_RF.split(counts)
        of_experts = zip(*(_by_expert(factors, counts) for factors in (*into, out)), strict=True)
        weights = zip(w_in_LDGF.split(1), w_out_LFD.split(1), strict=True)
        parts = zip(x_RD.split(counts), counts, weights, biases, keeps, of_experts, strict=True)
        one = replace(self, product=loop_product)
        return torch.cat(
            [
                one._rows(x, [n], w_in, w_out, activation, b, keep, found[:-1], found[-1])
                for x, n, (w_in, w_out), b, keep, found in parts
            ]
        )

    def _rows(
        self,
        x_RD: Tensor,
        counts: Sequence[int],
        w_in_LDGF: Tensor,
        w_out_LFD: Tensor,
        activation: str,
        b_in_LGF: Tensor | None,
        keep_RF: Tensor | None,
        into: Sequence[Factors | None],
        out: Factors | None,
    ) -> Tensor:
        h_RGF = self.product(x_RD, w_in_LDGF, counts).unflatten(-1, w_in_LDGF.shape[2:])
        if b_in_LGF is not None:
            h_RGF = h_RGF + torch.cat([b_GF.expand(n, -1, -1) for b_GF, n in zip(b_in_LGF, counts, strict=True)])
        updates = [h_RGF.new_zeros(()) if f is None else f.update(x_RD, counts) for f in into]
        if any(into):
            h_RGF = h_RGF + torch.stack([update.expand(h_RGF[:, 0].shape) for update in updates], 1)
        act_RF = activate((h_RGF.float() if self.activates_in_fp32 else h_RGF).unbind(1), activation)
        act_RF = (act_RF if keep_RF is None else act_RF * keep_RF).to(h_RGF.dtype)
        y_RD = self.product(act_RF, w_out_LFD, counts)
        return y_RD if out is None else y_RD + out.update(act_RF, counts)


def _by_expert(factors: Factors | None, counts: list[int]) -> Sequence[Factors | None]:
    """Of each expert. split, not indexing: see ops.experts.loop_experts."""
    if factors is None:
        return [None] * len(counts)
    keeps = [None] * len(counts) if factors.keep_RK is None else factors.keep_RK.split(counts)
    parts = zip(factors.a_LKr.split(1), factors.b_LrN.split(1), keeps, strict=True)
    return [Factors(a, b, factors.scale, keep) for a, b, keep in parts]
