"""RMSNorm of queries and keys before their rotation.

Legend: R rows (tokens), W width of this rank's heads together, N width of a head, S sequence, B batch, H heads.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from models.norm import RMSNorm
from ops.norm import Norm
from parallel.chunked_ops import rows_at_once
from parallel.process_groups import Groups
from parallel.sharding import set_sharding, sharding_of


def qk_layernorm(width: int, model: ModelConfig, dtype: torch.dtype, groups: Groups, function: Norm) -> RMSNorm:
    """The norm of the queries or of the keys. It is to be named q_layernorm or k_layernorm: where every head has the
    same weight, Megatron-Core adds up the gradients of parameters of this name over the tensor-parallel ranks, each of
    which has other heads (models.megatron_config.transformer_config).

    Args:
        width: of all heads of the whole model together.
    """
    full = model.qk_norm == "full"
    size = width // groups.tp.size() if full else model.head_width
    norm = RMSNorm(
        size,
        model.norm_eps,
        function=function,
        dtype=dtype,
        sequence_parallel=False,
        groups=groups,
        zero_centered=model.norm_zero_centered,
    )
    if full:  # sharded as the heads are
        set_sharding(norm.weight, (0, groups.tp), std=sharding_of(norm.weight).std)
    return norm


def norm_queries_and_keys(
    q_SBHN: Tensor, k_SBHN: Tensor, norms: tuple[RMSNorm, RMSNorm], full: bool, tp: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Args:
    full: over all heads together instead of over each.
    """
    (q_norm, k_norm), both = norms, (q_SBHN, k_SBHN)
    if not full:
        return q_norm(q_SBHN), k_norm(k_SBHN)
    q_SBW, k_SBW = (x_SBHN.flatten(2) for x_SBHN in both)
    if tp.size() == 1:
        normed = q_norm(q_SBW), k_norm(k_SBW)
    else:
        normed = sharded_rms_norms(q_SBW, k_SBW, q_norm.gain, k_norm.gain, q_norm.eps, tp)
    q_SBHN, k_SBHN = (y_SBW.view(x_SBHN.shape) for y_SBW, x_SBHN in zip(normed, both, strict=True))
    return q_SBHN, k_SBHN


def sharded_rms_norms(
    q_SBW: Tensor, k_SBW: Tensor, q_weight_W: Tensor, k_weight_W: Tensor, eps: float, tp: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """RMSNorm of two tensors, each over the widths of all ranks of `tp` together, of which each rank has W."""
    q_RW, k_RW = _ShardedRMSNorms.apply(q_SBW.flatten(0, 1), k_SBW.flatten(0, 1), q_weight_W, k_weight_W, eps, tp)
    return q_RW.view(q_SBW.shape), k_RW.view(k_SBW.shape)


class _ShardedRMSNorms(torch.autograd.Function):
    """One message for both in each direction: a number per row and tensor, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, q_RW: Tensor, k_RW: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, tp: Any
    ) -> tuple[Tensor, ...]:
        ctx.tp, xs = tp, (q_RW, k_RW)
        means_2R = q_RW.new_empty((2, len(q_RW)), dtype=torch.float32)
        for x_RW, mean_R in zip(xs, means_2R, strict=True):
            for x, mean in _blocks(x_RW, mean_R):
                mean.copy_(x.float().square().mean(1))
        scales_2R = _mean_over(means_2R, tp).add_(eps).rsqrt_()
        ys = tuple(torch.empty_like(x_RW, memory_format=torch.contiguous_format) for x_RW in xs)
        for x_RW, scale_R, weight, y_RW in zip(xs, scales_2R, (q_weight, k_weight), ys, strict=True):
            for x, scale, y in _blocks(x_RW, scale_R, y_RW):
                y.copy_((x.float() * scale[:, None]).mul_(weight))
        ctx.save_for_backward(*xs, q_weight, k_weight, scales_2R)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """As ops.norm._InBlocks, but for the mean of dy * weight * n, which is over all ranks' widths."""
        q_RW, k_RW, q_weight, k_weight, scales_2R = ctx.saved_tensors
        each = [*zip((q_RW, k_RW), dys, scales_2R, (q_weight.float(), k_weight.float()), strict=True)]
        means_2R, dweights = torch.empty_like(scales_2R), []
        for (x_RW, dy_RW, scale_R, weight), mean_R in zip(each, means_2R, strict=True):
            dweights.append(torch.zeros_like(weight))
            for x, dy, scale, mean in _blocks(x_RW, dy_RW, scale_R, mean_R):
                dy_n = (x.float() * scale[:, None]).mul_(dy)
                dweights[-1] += dy_n.sum(0)
                mean.copy_(torch.mv(dy_n, weight).div_(len(weight)))
        _mean_over(means_2R, ctx.tp)
        dxs = []
        for (x_RW, dy_RW, scale_R, weight), mean_R in zip(each, means_2R, strict=True):
            dxs.append(torch.empty_like(x_RW, memory_format=torch.contiguous_format))
            for x, dy, scale, mean, dx in _blocks(x_RW, dy_RW, scale_R, mean_R, dxs[-1]):
                n = x.float() * scale[:, None]
                dx.copy_((dy.float() * weight).addcmul_(n, mean[:, None], value=-1).mul_(scale[:, None]))
        return *dxs, *(dw.to(q_weight.dtype) for dw in dweights), None, None


def _blocks(x_RW: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = rows_at_once(x_RW.shape[1], x_RW.device)
    return zip(*(t.split(rows) for t in (x_RW, *others)), strict=True)


def _mean_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """In place, over ranks."""
    dist.all_reduce(x, group=group)
    return x.div_(group.size())
