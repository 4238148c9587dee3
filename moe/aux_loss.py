"""The load-balancing loss, and how a loss computed inside the model reaches its parameters.

Legend: E experts, B sequences of the micro-batch, or 1 where it is balanced as a whole.
"""

from typing import Any

import torch
from torch import Tensor


def load_balancing_loss(probs_BE: Tensor, load_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """This rank's part of E * sum_e f_e P_e (Switch, arXiv:2101.03961, eq. 4 to 6): 1 when uniform, E when one expert
    gets all. With several sequences the mean of each one's loss (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20). Summed
    over the ranks of a micro-batch it is the micro-batch's loss.

    Args:
        probs_BE: router probabilities, summed over this rank's tokens (RouterStats).
        load_BE: loads of the experts, of which only the proportions count: choices before any drop. A row for the
            whole micro-batch, or for each of its sequences; each rank holds part of every sequence.
        tokens_B: tokens over which the probabilities are averaged, on all ranks; a sequence without any is left out.
    """
    load_BE = load_BE.to(probs_BE.dtype)
    relative_BE = load_BE / load_BE.sum(1, keepdim=True).clamp(min=1) * load_BE.shape[1]
    of_each_B = (relative_BE * probs_BE).sum(1) / tokens_B.clamp(min=1)
    return of_each_B.sum() / (tokens_B > 0).sum().clamp(min=1)


class AttachLoss(torch.autograd.Function):
    """Passes y through and, in backward, feeds `scale` into `loss`, so that a loss computed inside the model reaches
    its parameters whatever the pipeline schedule does with the output."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
