"""What a run minimises, if not the cross-entropy of the next token: what the engine asks of it on the last pipeline
stage.

Legend: B sequences of a micro-batch, S sequence (this rank's shard), M metrics.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Batch = dict[str, Tensor]
"""One micro-batch: tokens, labels, positions int64 [B, S] over the whole sequence; optionally loss_mask fp32 [B, S],
the weight of each label in the loss (without it 1), padding bool [B, S], True for padding, and routing int
[B, S, L, K], the experts that the routers of the L sparse layers are to choose (moe.router_replay); further tensors [B]
that an objective needs."""

StepLoss = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""(the model's output on the last stage, the micro-batch) -> (the loss to run backward from, what is returned)."""


class Objective(Protocol):
    """A loss that is not a mean over tokens, such as one on pairs of sequences.

    A rank of context parallelism has a shard of every sequence, and gradients are summed over these ranks. The loss is
    therefore computed on all of them from values that were summed over `cp` (sum_over_ranks)."""

    metrics: tuple[str, ...]
    """Names of what is logged beside the loss."""

    def terms(self, output_BS: Tensor, batch: Batch, cp: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        """Of each item that the loss is averaged over (a prompt, N in a micro-batch): its loss [N], its metrics [N, M],
        and whether it counts [N]: padding of the last micro-batch of an evaluation does not. The same on every rank of
        cp."""
        ...


def training_loss(objective: Objective, cp: dist.ProcessGroup) -> StepLoss:
    """The mean loss of a micro-batch. Returns the mean of the loss and of the metrics [1 + M]; summed over the ranks of
    cp they are those of the micro-batch."""

    def loss(output_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses_N, metrics_NM, counts_N = objective.terms(output_BS, batch, cp)
        mean = _sums(losses_N, metrics_NM, counts_N) / counts_N.sum().clamp(min=1)
        # Not a view: a pipeline stage frees the data of its output.
        return mean[0].clone(), mean.detach() / cp.size()

    return loss


def evaluation_sums(objective: Objective, cp: dist.ProcessGroup) -> StepLoss:
    """The sums of the loss and of the metrics over a micro-batch, and the number of its items [2 + M]; all of them
    divided by the ranks of cp."""

    def loss(output_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses_N, metrics_NM, counts_N = objective.terms(output_BS, batch, cp)
        sums = _sums(losses_N, metrics_NM, counts_N)
        return sums[0].clone(), torch.cat([sums, counts_N.sum()[None].to(sums.dtype)]) / cp.size()

    return loss


def _sums(losses_N: Tensor, metrics_NM: Tensor, counts_N: Tensor) -> Tensor:
    every = torch.cat([losses_N[:, None], metrics_NM.detach()], 1)
    return every.where(counts_N[:, None], 0).sum(0)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of a group, which all compute the same from it. The gradient reaches this rank's term
    unchanged: that of the whole is the sum of what the ranks compute, and the gradient buckets add it up."""
    return x if group.size() == 1 else _SumOverRanks.apply(x, group)


def shard_over(x_BS: Tensor, cp: dist.ProcessGroup) -> Tensor:
    """This rank's shard of whole sequences."""
    return x_BS.chunk(cp.size(), dim=1)[cp.rank()].contiguous()
