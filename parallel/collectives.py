"""Synchronous collectives, with and without gradients. All but `sum_over_world` act along dimension 0.

torch 2.13 has new names for all_gather_into_tensor and reduce_scatter_tensor, which earlier versions lack.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenates every rank's x in rank order. Not differentiable. All ranks pass the same shape."""
    if group.size() == 1:
        return x
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)  # pyright: ignore[reportDeprecated]
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums x over ranks and returns this rank's 1/n of the rows. Not differentiable."""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)  # pyright: ignore[reportDeprecated]
    return out


class GatherSequence(torch.autograd.Function):
    """all_gather whose gradient is a reduce_scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.group), None


def _gather_ragged(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    # Padded to the longest: every backend has an all-gather of equal shapes.
    longest = max(counts)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    every = all_gather(padded, group)
    return torch.cat([every[r * longest : r * longest + n] for r, n in enumerate(counts)])


def _reduce_scatter_ragged(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    padded = x.new_zeros((len(counts), max(counts), *x.shape[1:]))
    for r, part in enumerate(x.split(counts)):
        padded[r, : counts[r]] = part
    return reduce_scatter(padded.flatten(0, 1), group)[: counts[group.rank()]].contiguous()


class GatherRagged(torch.autograd.Function):
    """All-gather of `counts[r]` rows from rank r, whose gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.route = (counts, group)
        return _gather_ragged(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_ragged(grad, *ctx.route), None, None


class ReduceScatterRagged(torch.autograd.Function):
    """Reduce-scatter that keeps `counts[r]` rows on rank r, whose gradient is an all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.route = (counts, group)
        return _reduce_scatter_ragged(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather_ragged(grad, *ctx.route), None, None


def sum_over_world(parts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums fp64 tensors over all ranks in one all-reduce, in which everything travels that a step sums over the world.
    Not differentiable; the host waits for the result.

    Args:
        parts: named tensors of any shape, on `device` or in host memory. Every rank passes the same names in the same
            order, with the same shapes.
        device: of the collective.

    Returns:
        The sums, in host memory.
    """
    here = {name: x for name, x in parts.items() if x.device == device}
    host = {name: x for name, x in parts.items() if name not in here}
    pieces = [x.flatten() for x in here.values()]
    if host:  # in one copy
        pieces.append(torch.cat([x.flatten() for x in host.values()]).to(device))
    message = torch.cat(pieces)
    assert message.dtype == torch.float64
    if dist.get_world_size() > 1:
        dist.all_reduce(message)
    order = here | host
    sums = message.cpu().split([x.numel() for x in order.values()])
    return {name: total.view(x.shape) for (name, x), total in zip(order.items(), sums, strict=True)}
