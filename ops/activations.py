"""The activations of the feed-forward layers, with their gradients.

Legend: R rows, F hidden width, G 2 for gated activations (gate, up), else 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Whether a layer has two input projections: f(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 5 and 6)."""
    function: Callable[[Tensor], Tensor]
    """f, element by element, which autograd can differentiate."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """(gradient of f(h), h) -> gradient of h. For layers that compute f again in the backward pass."""
    gradient_out: Callable[..., Tensor] | None = None
    """The same into a given tensor, `grad_input=`; None: the result of `gradient` is copied."""


def _check(activation: Activation) -> None:
    h = torch.linspace(-4.1, 4.2, 99, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(activation.function(h).sum(), h)
    if not torch.allclose(activation.gradient(torch.ones_like(wanted), h.detach()), wanted, rtol=1e-6):
        raise ValueError(f"activation {activation.name}: its gradient is not that of the function")


_aten = torch.ops.aten
ACTIVATIONS = Registry(
    "activation",
    Activation("swiglu", True, F.silu, _aten.silu_backward, _aten.silu_backward),
    Activation("geglu", True, F.gelu, _aten.gelu_backward, _aten.gelu_backward),
    Activation("gelu", False, F.gelu, _aten.gelu_backward),
    Activation("relu", False, F.relu, lambda grad, h: _aten.threshold_backward(grad, h, threshold=0)),
    Activation("relu2", False, lambda h: F.relu(h).square(), lambda grad, h: grad * (2 * F.relu(h))),
    check=_check,
)
assert {name for name, activation in ACTIVATIONS.items() if activation.gated} == set(GATED_ACTIVATIONS)


def activate(parts: Sequence[Tensor], name: str) -> Tensor:
    """f(h) of one part for plain activations, f(gate) * up of (gate, up) for gated ones."""
    activation = ACTIVATIONS[name]
    if not activation.gated:
        (h,) = parts
        return activation.function(h)
    gate, up = parts
    return activation.function(gate) * up


def activate_again(h_RGF: Tensor, dact_RF: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(h) as `activate` makes it, and the gradient of h [R, G * F] for its gradient."""
    activation = ACTIVATIONS[name]
    if not activation.gated:
        h_RF = h_RGF.squeeze(1)
        return activation.function(h_RF), activation.gradient(dact_RF, h_RF)
    (gate, up), dh_RGF = h_RGF.unbind(1), torch.empty_like(h_RGF)
    activated = activation.function(gate)
    if activation.gradient_out is None:
        dh_RGF[:, 0] = activation.gradient(dact_RF * up, gate)
    else:
        activation.gradient_out(dact_RF * up, gate, grad_input=dh_RGF[:, 0])
    torch.mul(dact_RF, activated, out=dh_RGF[:, 1])
    return activated * up, dh_RGF.flatten(1)
