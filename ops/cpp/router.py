"""The router's product in C++ (router.cpp).

Legend: T tokens, D hidden, E experts.
"""

from torch import Tensor

from ops.cpp.operators import NAMESPACE


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """ops.routing.router_logits for tokens in bf16."""
    return NAMESPACE.router_logits.default(x_TD, weight_ED)
