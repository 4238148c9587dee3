"""Losses and norms of bf16 rows in C++ (rows.cpp).

Legend: T tokens, V vocabulary (this rank's slice), D hidden.
"""

from torch import Tensor

from ops.cpp.operators import NAMESPACE
from ops.fused_cross_entropy import losses_with


class _Losses:
    """For ops.fused_cross_entropy."""

    def sums(self, logits_TV: Tensor, mine_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return NAMESPACE.cross_entropy_sums.default(logits_TV, mine_T)

    def become_gradient(
        self, logits_TV: Tensor, mine_T: Tensor, largest_T: Tensor, sum_T: Tensor, grad_T: Tensor
    ) -> None:
        NAMESPACE.cross_entropy_gradient_.default(logits_TV, mine_T, largest_T, sum_T, grad_T)


token_losses = losses_with(_Losses())


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """ops.norm.Norm."""
    y_RD, _ = NAMESPACE.rms_norm.default(x.flatten(0, -2), weight_D, eps)
    return y_RD.view(x.shape)
