"""The activations of the feed-forward layers, with their gradients.

Legend: R rows, F hidden width, G 2 for gated activations (gate, up), else 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.model_schema import GATED_ACTIVATIONS
from conf.registry import Registry


@dataclass(frozen=True)
class Activation:
    """A value of model.activation."""

    name: str
    gated: bool
    """Whether a layer has two input projections: f(gate) * g(up) (Shazeer 2020, arXiv:2002.05202, eq. 5 and 6)."""
    function: Callable[[Tensor], Tensor]
    """f, element by element, which autograd can differentiate."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """(gradient of f(h), h) -> gradient of h. For layers that compute f again in the backward pass."""
    gradient_out: Callable[..., Tensor] | None = None
    """The same into a given tensor, `grad_input=`; None: the result of `gradient` is copied."""
    of_up: Callable[[Tensor], Tensor] | None = None
    """g of a gated one; None: up itself."""
    gradient_of_up: Callable[[Tensor, Tensor], Tensor] | None = None
    """(gradient of g(up), up) -> gradient of up."""


def _check(activation: Activation) -> None:
    h = torch.linspace(-4.1, 4.2, 99, dtype=torch.float64, requires_grad=True)
    pairs = [(activation.function, activation.gradient)]
    if activation.of_up is not None and activation.gradient_of_up is not None:
        pairs.append((activation.of_up, activation.gradient_of_up))
    for function, gradient in pairs:
        (wanted,) = torch.autograd.grad(function(h).sum(), h)
        if not torch.allclose(gradient(torch.ones_like(wanted), h.detach()), wanted, rtol=1e-6):
            raise ValueError(f"activation {activation.name}: its gradient is not that of the function")


@cache
def clamped_swiglu(alpha: float, limit: float) -> Activation:
    """(clamp(up) + 1) * gate * sigmoid(alpha * gate) of a gate that is clamped from above (gpt-oss,
    arXiv:2508.10925, section 2.2, and its published code)."""

    def function(h: Tensor) -> Tensor:
        h = h.clamp(max=limit)
        return h * torch.sigmoid(alpha * h)

    def gradient(grad: Tensor, h: Tensor) -> Tensor:
        below, h = h <= limit, h.clamp(max=limit)
        share = torch.sigmoid(alpha * h)
        return grad * (share * (1 + alpha * h * (1 - share))) * below

    class Function(torch.autograd.Function):
        """Keeps its input alone for the backward pass."""

        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return function(h)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return gradient(grad, *ctx.saved_tensors)

    return Activation(
        "clamped_swiglu",
        True,
        lambda h: Function.apply(h) if torch.is_grad_enabled() else function(h),
        gradient,
        of_up=lambda up: up.clamp(-limit, limit) + 1,
        gradient_of_up=lambda grad, up: grad * (up.abs() <= limit),
    )


_aten = torch.ops.aten
ACTIVATIONS = Registry(
    "activation",
    Activation("swiglu", True, F.silu, _aten.silu_backward, _aten.silu_backward),
    Activation("geglu", True, F.gelu, _aten.gelu_backward, _aten.gelu_backward),
    Activation("gelu", False, F.gelu, _aten.gelu_backward),
    Activation("relu", False, F.relu, lambda grad, h: _aten.threshold_backward(grad, h, threshold=0)),
    Activation("relu2", False, lambda h: F.relu(h).square(), lambda grad, h: grad * (2 * F.relu(h))),
    clamped_swiglu(1.702, 7.0),
    check=_check,
)
IN_KERNELS = ("swiglu", "geglu", "gelu", "relu", "relu2")
"""Those that the C++ and the Triton kernels have."""
assert {name for name, activation in ACTIVATIONS.items() if activation.gated} == set(GATED_ACTIVATIONS)


def _named(name: str) -> Activation:
    """Of ModelConfig.activation_name."""
    kind, *parameters = name.split(":")
    return clamped_swiglu(*map(float, parameters)) if parameters else ACTIVATIONS[kind]


def activate(parts: Sequence[Tensor], name: str) -> Tensor:
    """f(h) of one part for plain activations, f(gate) * g(up) of (gate, up) for gated ones.

    Args:
        name: as ModelConfig.activation_name has it.
    """
    activation = _named(name)
    if not activation.gated:
        (h,) = parts
        return activation.function(h)
    gate, up = parts
    return activation.function(gate) * (up if activation.of_up is None else activation.of_up(up))


def activate_again(h_RGF: Tensor, dact_RF: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(h) as `activate` makes it, and the gradient of h [R, G * F] for its gradient."""
    activation = _named(name)
    if not activation.gated:
        h_RF = h_RGF.squeeze(1)
        return activation.function(h_RF), activation.gradient(dact_RF, h_RF)
    (gate, up), dh_RGF = h_RGF.unbind(1), torch.empty_like(h_RGF)
    activated, factor = activation.function(gate), up if activation.of_up is None else activation.of_up(up)
    if activation.gradient_out is None:
        dh_RGF[:, 0] = activation.gradient(dact_RF * factor, gate)
    else:
        activation.gradient_out(dact_RF * factor, gate, grad_input=dh_RGF[:, 0])
    if activation.gradient_of_up is None:
        torch.mul(dact_RF, activated, out=dh_RGF[:, 1])
    else:
        dh_RGF[:, 1] = activation.gradient_of_up(dact_RF * activated, up)
    return activated * factor, dh_RGF.flatten(1)
