"""The loss of every token (ops/cross_entropy.py) on kernels that read each logit once and keep it in no other form.

Legend: T tokens, V vocabulary (this rank's slice).
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Kernels(Protocol):
    def sums(self, logits_TV: Tensor, mine_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the largest logit, the sum of e^(logit - largest), the label's logit or 0 where it is not among these) of
        each token, fp32."""
        ...

    def become_gradient(
        self, logits_TV: Tensor, mine_T: Tensor, largest_T: Tensor, sum_T: Tensor, grad_T: Tensor
    ) -> None:
        """Writes (e^(logit - largest) / sum - [it is the label's]) * grad over the logits."""


class _TokenLoss(torch.autograd.Function):
    """-log softmax(logits)[label]. The gradient takes the place of the logits, which with a large vocabulary are the
    largest tensor of a step."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, logits_TV: Tensor, labels_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        logits_TV = logits_TV.contiguous()
        mine_T = (labels_T - group.rank() * logits_TV.shape[1]).contiguous()
        largest_T, sum_T, label_T = kernels.sums(logits_TV, mine_T)
        if group.size() > 1:
            here_T, largest_T = largest_T, largest_T.clone()
            dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
            both_2T = torch.stack((sum_T * (here_T - largest_T).exp(), label_T))
            dist.all_reduce(both_2T, group=group)
            sum_T, label_T = both_2T
        ctx.save_for_backward(logits_TV, mine_T, largest_T, sum_T)
        ctx.kernels, ctx.spent = kernels, False
        return sum_T.log() - (label_T - largest_T)  # in this order: what is large cancels first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[None, Tensor, None, None]:
        assert not ctx.spent, "the logits have become their gradient: there is no second backward pass"
        ctx.spent = True
        logits_TV, *about = ctx.saved_tensors
        ctx.kernels.become_gradient(logits_TV, *about, grad_T.contiguous())
        torch.autograd.graph.increment_version(logits_TV)  # for whoever keeps the logits
        return None, logits_TV.detach(), None, None


def losses_with(kernels: Kernels) -> Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]:
    """ops.cross_entropy.token_losses, but that the backward pass overwrites the logits."""
    return functools.partial(_token_losses, kernels)


def _token_losses(kernels: Kernels, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _TokenLoss.apply(kernels, logits.flatten(0, -2), labels.flatten(), group).view(labels.shape)
