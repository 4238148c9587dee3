"""The feed-forward layers: one dense, or many experts.

Legend: R routed rows grouped by expert, D hidden, F expert hidden (this rank's slice), L experts of this rank,
G 2 for gated activations, else 1.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from parallel.placement import place
from parallel.runtime import Groups

GATED = {"swiglu": F.silu, "geglu": F.gelu}
PLAIN = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda h: F.relu(h).square()}
aten = torch.ops.aten
BACKWARD = {"swiglu": aten.silu_backward, "geglu": aten.gelu_backward, "gelu": aten.gelu_backward}
BACKWARD["relu"] = functools.partial(aten.threshold_backward, threshold=0)
BACKWARD["relu2"] = lambda grad, h: grad * (2 * F.relu(h))
"""The gradient of each nonlinearity: (gradient of its output, its input) -> gradient of its input."""


def activate(parts: Sequence[Tensor], name: str) -> Tensor:
    """act(h) of one part for plain activations, act(gate) * up of (gate, up) for gated ones (Shazeer 2020,
    arXiv:2002.05202, eq. 5 and 6)."""
    if name in PLAIN:
        (h,) = parts
        return PLAIN[name](h)
    gate, up = parts
    return GATED[name](gate) * up


def loop_experts(x_RD: Tensor, counts: list[int], w_in_LDGF: Tensor, w_out_LFD: Tensor, activation: str) -> Tensor:
    """One product per expert: the reference."""
    out = []
    # unbind, not indexing: the gradient of w[e] would be a zero tensor of the size of all experts, once per expert.
    for x, w_in_DGF, w_out_FD in zip(x_RD.split(counts), w_in_LDGF.unbind(0), w_out_LFD.unbind(0), strict=True):
        h = (x @ w_in_DGF.flatten(1)).unflatten(-1, w_in_DGF.shape[1:])
        out.append(activate(h.unbind(-2), activation) @ w_out_FD)
    return torch.cat(out)


def grouped_experts(x_RD: Tensor, counts: list[int], w_in_LDGF: Tensor, w_out_LFD: Tensor, activation: str) -> Tensor:
    """torch's grouped matrix product: one launch for all experts."""
    if not x_RD.shape[0]:
        return loop_experts(x_RD, counts, w_in_LDGF, w_out_LFD, activation)  # a grouped product needs a row
    ends = torch.tensor(counts, device=x_RD.device).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x_RD, w_in_LDGF.flatten(2), offs=ends).unflatten(-1, w_in_LDGF.shape[2:])
    return F.grouped_mm(activate(h.unbind(-2), activation), w_out_LFD, offs=ends)


class FusedExperts(torch.autograd.Function):
    """The loop as one operation. Every product is written straight into its place in the stacked result, and of the
    hidden width only h is kept for the backward pass: repeating the activation is cheaper than storing it."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, counts: list[int], w_in_LDGF: Tensor, w_out_LFD: Tensor, activation: str) -> Tensor:
        ctx.counts, ctx.activation = counts, activation
        h_RGF = x_RD.new_empty((x_RD.shape[0], *w_in_LDGF.shape[2:]))
        y_RD = torch.empty_like(x_RD)
        rows = (t.split(counts) for t in (x_RD, h_RGF, y_RD))
        for x, h, y, w_in_DGF, w_out_FD in zip(*rows, w_in_LDGF, w_out_LFD, strict=True):
            torch.mm(x, w_in_DGF.flatten(1), out=h.flatten(1))
            torch.mm(activate(h.unbind(1), activation), w_out_FD, out=y)
        ctx.save_for_backward(x_RD, h_RGF, w_in_LDGF, w_out_LFD)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x_RD, h_RGF, *weights = ctx.saved_tensors
        dx_RD, *dweights = (torch.empty_like(t) for t in (x_RD, *weights))
        rows = (t.split(ctx.counts) for t in (x_RD, h_RGF, dy_RD, dx_RD))
        for x, h, dy, dx, w_in_DGF, w_out_FD, dw_in_DGF, dw_out_FD in zip(*rows, *weights, *dweights, strict=True):
            act, dh = _activate_again(h, dy @ w_out_FD.t(), ctx.activation)
            torch.mm(act.t(), dy, out=dw_out_FD)
            torch.mm(x.t(), dh, out=dw_in_DGF.flatten(1))
            torch.mm(dh, w_in_DGF.flatten(1).t(), out=dx)
        return dx_RD, None, *dweights, None


def _activate_again(h_RGF: Tensor, dact_RF: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(h) as `activate` makes it, and the gradient of h [R, G * F] for its gradient."""
    if name in PLAIN:
        h_RF = h_RGF.squeeze(1)
        return PLAIN[name](h_RF), BACKWARD[name](dact_RF, h_RF)
    (gate, up), dh_RGF = h_RGF.unbind(1), torch.empty_like(h_RGF)
    nonlinear = GATED[name](gate)
    dh_RGF[:, 0] = BACKWARD[name](dact_RF * up, gate)
    torch.mul(dact_RF, nonlinear, out=dh_RGF[:, 1])
    return nonlinear * up, dh_RGF.flatten(1)


BACKENDS = {"loop": loop_experts, "grouped_mm": grouped_experts, "fused": FusedExperts.apply}


def choose_backend(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, why) for model.moe.backend.

    Raises:
        ValueError: grouped_mm was asked for and cannot run.
    """
    wanted = model.moe.backend
    if wanted in ("loop", "fused"):
        return wanted, "asked for"
    row_bytes = torch.finfo(dtype).bits // 8
    misfit = [n for n in (model.hidden_size, model.ffn_hidden_size) if n * row_bytes % 16]
    if wanted == "grouped_mm":
        if misfit:
            raise ValueError(
                f"model.moe.backend=grouped_mm needs rows of a multiple of 16 bytes; {misfit[0]} values of {dtype} are "
                "not. Use model.moe.backend=loop, or sizes divisible by 8"
            )
        return "grouped_mm", "asked for"
    if device.type == "cuda" and dtype == torch.bfloat16 and not misfit:
        return "grouped_mm", "one launch for all experts"
    if device.type == "cpu":
        return "fused", "one operation, which keeps less for the backward pass than loop"
    return "loop", f"{dtype} on a GPU" if dtype != torch.bfloat16 else "rows are not a multiple of 16 bytes"


class Experts(nn.Module):
    """This rank's experts: E is cut over expert-parallel, F over expert-tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, *, backend: str, dtype: torch.dtype, groups: Groups):
        super().__init__()
        self.activation, self.backend = model.activation, BACKENDS[backend]
        local, hidden = model.moe.num_experts // groups.ep.size(), model.hidden_size
        width, gates = model.ffn_hidden_size // groups.etp.size(), 2 if model.activation in GATED else 1
        self.w_in = nn.Parameter(torch.empty(local, hidden, gates, width, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(local, width, hidden, dtype=dtype))
        for weight, axis, fan_in in ((self.w_in, 3, hidden), (self.w_out, 1, model.ffn_hidden_size)):
            std = (model.init_scale / fan_in) ** 0.5
            place(weight, (0, groups.ep), (axis, groups.etp), std=std, per_expert=True)
            # Megatron-Core then reduces these over the expert-data-parallel group; needed at ep = 1 as well.
            weight.allreduce = False

    def forward(self, x_RD: Tensor, counts: list[int]) -> Tensor:
        """counts: rows of each expert. Returns [R, D], partial sums over etp when F is cut."""
        return self.backend(x_RD, counts, self.w_in, self.w_out, self.activation)


class DenseFFN(nn.Module):
    """The feed-forward layer of a dense block, F cut over tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Groups):
        super().__init__()
        self.activation = model.activation
        linear = {"config": config, "bias": False, "init_method": None, "tp_group": groups.tp}
        into = {"gather_output": False, **linear}
        # Gate and up are separate layers, so that a tensor-parallel slice of each is a slice of the whole.
        self.up = tp.ColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, **into)
        self.gate = None
        if model.activation in GATED:
            self.gate = tp.ColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, **into)
        self.down = tp.RowParallelLinear(
            model.ffn_hidden_size, model.hidden_size, input_is_parallel=True, skip_bias_add=True, **linear
        )
        for layer in filter(None, (self.up, self.gate)):
            place(layer.weight, (0, groups.tp), std=(model.init_scale / model.hidden_size) ** 0.5)
        place(self.down.weight, (1, groups.tp), std=(model.init_scale / model.ffn_hidden_size) ** 0.5)

    def forward(self, x_SBD: Tensor) -> Tensor:
        parts = [layer(x_SBD)[0] for layer in (self.gate, self.up) if layer is not None]
        return self.down(activate(parts, self.activation))[0]
