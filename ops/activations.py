"""The nonlinearities of the feed-forward layers, with their gradients.

Legend: R rows, F hidden width, G 2 for gated activations (gate, up), else 1.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = {"swiglu": F.silu, "geglu": F.gelu}
PLAIN = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda h: F.relu(h).square()}
aten = torch.ops.aten
BACKWARD = {"swiglu": aten.silu_backward, "geglu": aten.gelu_backward, "gelu": aten.gelu_backward}
BACKWARD["relu"] = partial(aten.threshold_backward, threshold=0)
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


def activate_again(h_RGF: Tensor, dact_RF: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(h) as `activate` makes it, and the gradient of h [R, G * F] for its gradient."""
    if name in PLAIN:
        h_RF = h_RGF.squeeze(1)
        return PLAIN[name](h_RF), BACKWARD[name](dact_RF, h_RF)
    (gate, up), dh_RGF = h_RGF.unbind(1), torch.empty_like(h_RGF)
    nonlinear = GATED[name](gate)
    BACKWARD[name](dact_RF * up, gate, grad_input=dh_RGF[:, 0])
    torch.mul(dact_RF, nonlinear, out=dh_RGF[:, 1])
    return nonlinear * up, dh_RGF.flatten(1)
