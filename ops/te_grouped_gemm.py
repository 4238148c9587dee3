"""TransformerEngine's grouped product, where the package is installed.

Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts of this rank.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn


def te_grouped_product(x_RK: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """[R, N]: each expert's rows times its weight [L, K, ...], on transformer_engine.pytorch.GroupedLinear."""
    w_LKN = w.flatten(2)
    experts, inner, outer = w_LKN.shape
    # It has the outer dimension first, and takes contiguous weights. Autograd brings the gradient back.
    weights = {f"weight{e}": w_KN.t().contiguous() for e, w_KN in enumerate(w_LKN.unbind(0))}
    return torch.func.functional_call(_layer(experts, inner, outer), weights, (x_RK, list(counts)))


@cache
def _layer(experts: int, inner: int, outer: int) -> nn.Module:
    """Without weights of its own: every call brings them."""
    from transformer_engine.pytorch import GroupedLinear  # pyright: ignore[reportMissingImports]

    return GroupedLinear(experts, inner, outer, bias=False, params_dtype=torch.bfloat16, device="meta")
