"""Experts with low-rank adapters: act(x @ w_in + s * x @ a_in @ b_in + b) @ w_out + s * act @ a_out @ b_out of each
row's expert, where w_in and w_out get no gradient.

Legend: R routed rows grouped by expert, D hidden, F expert hidden, L experts of this rank, G 2 for gated activations,
else 1, K inner and N outer dimension of a product, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
    def forward(ctx, gemm: GemmBackend, x_RK: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.gemm, ctx.w, ctx.groups = gemm, w, gemm.groups(list(counts), x_RK.device)
        return gemm.product(gemm.rows(x_RK), expert_weight(gemm, w).forward, ctx.groups, x_RK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        gemm = ctx.gemm
        weight = expert_weight(gemm, ctx.w)
        return None, gemm.product(gemm.rows(dy_RN.contiguous()), weight.back, ctx.groups, dy_RN.dtype), None, None


def frozen_product(gemm: GemmBackend) -> Product:
    """The Product of a GEMM backend."""
    return partial(_FrozenProduct.apply, gemm)


def adapted_experts(
    product: Product,
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
        product: for the weights.
        b_in_LGF, keep_RF: as in ops.experts.loop_experts.
        into: of each input projection; None: it has no adapter.
        out: of the output projection.
    """
    product = product if x_RD.shape[0] else loop_product  # a grouped product needs a row
    h_RGF = product(x_RD, w_in_LDGF, counts).unflatten(-1, w_in_LDGF.shape[2:])
    if b_in_LGF is not None:
        h_RGF = h_RGF + torch.cat([b_GF.expand(n, -1, -1) for b_GF, n in zip(b_in_LGF, counts, strict=True)])
    parts = h_RGF.unbind(-2)
    parts = [h if f is None else h + f.update(x_RD, counts) for h, f in zip(parts, into, strict=True)]
    act_RF = activate(parts, activation)
    act_RF = act_RF if keep_RF is None else act_RF * keep_RF
    y_RD = product(act_RF, w_out_LFD, counts)
    return y_RD if out is None else y_RD + out.update(act_RF, counts)
