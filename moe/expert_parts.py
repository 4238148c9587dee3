"""The weights of a rank's experts, whole or in equal parts of neighbouring experts, whose rows are computed while those
of another part travel (model.moe.overlap_degree).

Legend: L experts of this rank, D hidden, F expert hidden (this rank's slice), G 2 for gated activations, else 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.gemm_backend import main_gradient, main_gradient_parts


@dataclass(frozen=True)
class ExpertWeights:
    """What some experts compute with."""

    w_in_LDGF: Tensor
    w_out_LFD: Tensor
    b_in_LGF: Tensor | None = None
    b_out_LD: Tensor | None = None
    """This rank's columns of it."""
    adapters: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A and B of each adapted projection (moe.expert_lora)."""

    def split(self, parts: int) -> list["ExpertWeights"]:
        """Equal parts in the order of the experts. The gradient of a weight is one, as of the whole."""
        if parts == 1:
            return [self]
        columns = [[None] * parts if w is None else split_weight(w, parts) for w in (self.b_in_LGF, self.b_out_LD)]
        adapters = {name: [split_weight(f, parts) for f in pair] for name, pair in self.adapters.items()}
        w_in, w_out = (split_weight(w, parts) for w in (self.w_in_LDGF, self.w_out_LFD))
        return [
            ExpertWeights(
                w_in[p], w_out[p], columns[0][p], columns[1][p], {n: (a[p], b[p]) for n, (a, b) in adapters.items()}
            )
            for p in range(parts)
        ]


def split_weight(w: Tensor, parts: int) -> list[Tensor]:
    """Equal parts of a weight along its experts. A GEMM backend keeps a weight's FP8 form for all experts at once, and
    adds a part's gradient to its part of the main gradient, as it does with the whole weight."""
    mains = main_gradient_parts(w, parts) if w.requires_grad else None
    split: tuple[Tensor, ...] = _SplitWeight.apply(w, parts, mains)
    size = len(w) // parts
    for index, part in enumerate(split):
        part.part_of = (w, slice(index * size, (index + 1) * size))  # pyright: ignore[reportAttributeAccessIssue]
        if mains is not None:
            part.main_gradient_part = mains[index]  # pyright: ignore[reportAttributeAccessIssue]
    return list(split)


class _SplitWeight(torch.autograd.Function):
    """Joins the gradients of the parts. With a main gradient each is added to its part of it, once: a copy of all of
    them would be as large as the experts."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, parts: int, mains: Any) -> tuple[Tensor, ...]:
        # The parameter itself, not what autograd would give back of it: its main gradient is an attribute.
        ctx.w, ctx.mains = w, mains
        return tuple(w.chunk(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.mains is None:
            return torch.cat(grads), None, None
        main_gradient(ctx.w)  # the hook is to leave the gradient alone
        for part, grad in zip(ctx.mains, grads, strict=True):
            if not part.added:
                part.main_grad.add_(grad)
        return torch.empty_like(ctx.w), None, None
