"""A bound on the memory of the experts' hidden width, whatever the router does.

Legend: R routed rows grouped by expert, D hidden, F expert hidden, L experts of this rank, G 2 for gated activations,
else 1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Run = Callable[..., Tensor]
"""(rows, x_RD, counts, *weights) -> y_RD: answers for some rows by some experts."""


def pieces(counts: Sequence[int], limit: int) -> Iterator[tuple[slice, list[tuple[slice, list[int]]]]]:
    """Cuts the rows into pieces of at most `limit`: (experts, [(rows, counts of these experts), ...]). Neighbours whose
    rows fit share a piece; an expert with more rows than that is alone and has several."""
    first = start = rows = 0
    for e, n in enumerate(counts):
        if e > first and rows + n > limit:
            yield slice(first, e), [(slice(start, start + rows), list(counts[first:e]))]
            first, start, rows = e, start + rows, 0
        if n > limit:
            ends = [*range(start + limit, start + n, limit), start + n]
            starts = [start, *ends[:-1]]
            yield slice(e, e + 1), [(slice(a, b), [b - a]) for a, b in zip(starts, ends, strict=True)]
            first, start, rows = e + 1, start + n, 0
        else:
            rows += n
    if first < len(counts):
        yield slice(first, len(counts)), [(slice(start, start + rows), list(counts[first:]))]


def piece_of(weight: Tensor, experts: slice) -> Tensor:
    """These experts' part of a weight, which knows what it is a part of. The weight may be a part itself."""
    piece = weight.detach()[experts]
    whole, outer = getattr(weight, "part_of", (weight, slice(0, None)))
    within = slice(outer.start + experts.start, outer.start + experts.stop)
    piece.part_of = (whole, within)  # pyright: ignore[reportAttributeAccessIssue]
    return piece


class InPieces(torch.autograd.Function):
    """`run` on a piece at a time. Only x is kept for the backward pass, which runs each piece again, so that no more
    than `limit` rows of hidden width are ever there."""

    @staticmethod
    def forward(ctx: Any, run: Run, limit: int, counts: Sequence[int], x_RD: Tensor, *weights: Tensor) -> Tensor:
        ctx.run, ctx.limit, ctx.counts = run, limit, counts
        # The weights themselves, not what autograd would give back of them: a GEMM backend keeps things on a parameter.
        ctx.weights = weights
        ctx.save_for_backward(x_RD)
        y_RD = torch.empty_like(x_RD)
        for experts, parts in pieces(counts, limit):
            mine = [piece_of(w, experts) for w in weights]
            for rows, of_each in parts:
                y_RD[rows] = run(rows, x_RD[rows], of_each, *mine)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        (x_RD,), every = ctx.saved_tensors, ctx.weights
        trained = ctx.needs_input_grad[4:]
        weights = [w for w, is_trained in zip(every, trained, strict=True) if is_trained]
        dx_RD, *dweights = (torch.empty_like(t) for t in (x_RD, *weights))
        for experts, parts in pieces(ctx.counts, ctx.limit):
            sums: list[Tensor] = []
            pieces_of_weights = [piece_of(w, experts) for w in every]
            mine = [w.requires_grad_() for w, is_trained in zip(pieces_of_weights, trained, strict=True) if is_trained]
            for rows, of_each in parts:
                x = x_RD[rows].detach().requires_grad_()
                with torch.enable_grad():
                    y = ctx.run(rows, x, of_each, *pieces_of_weights)
                dx_RD[rows], *added = torch.autograd.grad(y, (x, *mine), dy_RD[rows])
                # Sums of many pieces in fp32; one piece is its own sum.
                sums = [s.float() + a for s, a in zip(sums, added, strict=True)] if sums else added
            for whole, part in zip(dweights, sums, strict=True):
                whole[experts] = part
        for w, dw in zip(weights, dweights, strict=True):
            # An earlier micro-batch, small enough not to be cut, may have added its gradient there by itself; then
            # Megatron-Core's hook leaves alone what is returned (ops.gemm_backend.main_gradient).
            if getattr(w, "grad_added_to_main_grad", False):
                w.main_grad += dw
        found = iter(dweights)
        return None, None, None, dx_RD, *(next(found) if is_trained else None for is_trained in trained)
