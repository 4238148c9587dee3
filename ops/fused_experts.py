"""All experts as one operation, on row counts that repeat.

Legend: R routed rows grouped by expert, D hidden, F expert hidden, L experts, G 2 for gated activations, else 1.

oneDNN, which multiplies bf16 on a CPU, compiles a kernel for every shape it has not seen: three to ten milliseconds on
one core, often longer than the product itself. The router sends every expert another number of rows at every step. So a
product runs on a window of rows of a rounded size, and what it computes beyond the expert's own rows is overwritten by
the next expert, or multiplied by zero.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.activations import activate, activate_again

COMPILED_PER_SHAPE = (torch.bfloat16, torch.float16)
"""What oneDNN multiplies; fp32 goes to a library whose kernels serve every shape."""


class Window(NamedTuple):
    """Rows that one expert's products run on: first <= start <= stop <= last."""

    start: int
    stop: int
    """The expert's own rows."""
    first: int
    last: int


def repeating_size(rows: int) -> int:
    """`rows` rounded up to one of 16 sizes per power of two, at least 16 rows apart: 3 % more rows on average."""
    step = max(16, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def windows(counts: Sequence[int], rounded: bool) -> Iterator[Window]:
    """One per expert; of the expert's own rows where nothing is rounded or there are too few rows in all. The window of
    the last rows begins before them."""
    total, start = sum(counts), 0
    for n in counts:
        size = repeating_size(n) if rounded else n
        first = min(start, total - size)
        yield Window(start, start + n, *((first, first + size) if first >= 0 else (start, start + n)))
        start += n


def multiply(a: Tensor, b: Tensor, out: Tensor, at: Window) -> None:
    """Writes the window's rows of a @ b into `out`. What it writes past the expert's rows belongs to experts that come
    later; rows before them are finished and stay."""
    if at.first == at.start:
        torch.mm(a, b, out=out[at.first : at.last])
    else:
        out[at.start : at.stop] = (a @ b)[at.start - at.first : at.stop - at.first]


class FusedExperts(torch.autograd.Function):
    """ops.experts.loop_experts as one operation. Every product is written straight into its place in the stacked
    result, and of the hidden width only h is kept for the backward pass: repeating the activation is cheaper than
    storing it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        counts: Sequence[int],
        w_in_LDGF: Tensor,
        w_out_LFD: Tensor,
        activation: str,
        b_in_LGF: Tensor | None = None,
        keep_RF: Tensor | None = None,
    ) -> Tensor:
        rounded = x_RD.device.type == "cpu" and x_RD.dtype in COMPILED_PER_SHAPE
        ctx.windows, ctx.activation = list(windows(counts, rounded)), activation
        h_RGF = x_RD.new_empty((x_RD.shape[0], *w_in_LDGF.shape[2:]))
        y_RD = torch.empty_like(x_RD)
        for e, at in enumerate(ctx.windows):
            if at.start == at.stop:
                continue
            rows = slice(at.first, at.last)
            multiply(x_RD[rows], w_in_LDGF[e].flatten(1), h_RGF.flatten(1), at)
            if b_in_LGF is not None:
                h_RGF[at.start : at.stop] += b_in_LGF[e]
            act = activate(h_RGF[rows].unbind(1), activation)
            multiply(act if keep_RF is None else act * keep_RF[rows], w_out_LFD[e], y_RD, at)
        ctx.has_bias = b_in_LGF is not None
        ctx.save_for_backward(x_RD, h_RGF, keep_RF, w_in_LDGF, w_out_LFD)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RGF, keep_RF, w_in_LDGF, w_out_LFD = ctx.saved_tensors
        dx_RD, dw_in, dw_out = (torch.empty_like(t) for t in (x_RD, w_in_LDGF, w_out_LFD))
        db_in_LGF = w_in_LDGF.new_empty((len(ctx.windows), *w_in_LDGF.shape[2:])) if ctx.has_bias else None
        for e, at in enumerate(ctx.windows):
            rows = slice(at.first, at.last)
            keep = None if keep_RF is None else keep_RF[rows]
            dact = dy_RD[rows] @ w_out_LFD[e].t()
            act, dh = activate_again(h_RGF[rows], dact if keep is None else dact * keep, ctx.activation)
            act = act if keep is None else act * keep
            for t in (act, dh):  # the weights' gradients are sums over the expert's own rows
                t[: at.start - at.first] = 0
                t[at.stop - at.first :] = 0
            torch.mm(act.t(), dy_RD[rows], out=dw_out[e])
            torch.mm(x_RD[rows].t(), dh, out=dw_in[e].flatten(1))
            multiply(dh, w_in_LDGF[e].flatten(1).t(), dx_RD, at)
            if db_in_LGF is not None:
                torch.sum(dh, 0, out=db_in_LGF[e].view(-1))
        return dx_RD, None, dw_in, dw_out, None, db_in_LGF, None
