"""Builds Megatron-Core's distributed optimizer."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from conf.schema import OptimConfig, ParallelConfig
from parallel.megatron_compat import cuda_type_names, keep_from_compiler, set_optimizer_class
from parallel.megatron_groups import optimizer_groups
from parallel.process_groups import Groups


@dataclass(frozen=True)
class Overlap:
    """Which data-parallel communication overlaps with computation."""

    grad_reduce: bool = False
    param_gather: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, backend: str) -> "Overlap":
        """The overlap that the settings ask for. By default it is on under NCCL; gloo would take CPU time from the
        computation."""
        grads, weights = parallel.overlap_grad_reduce, parallel.overlap_param_gather
        if grads and parallel.optimizer_instances > 1 and backend == "gloo":
            raise ValueError(
                f"parallel.overlap_grad_reduce=true with parallel.optimizer_instances={parallel.optimizer_instances} "
                "needs a GPU: instances communicate on a CUDA stream. Set parallel.overlap_grad_reduce=null"
            )
        grads = backend == "nccl" if grads is None else grads
        return cls(grads, grads if weights is None else weights)


NO_OVERLAP = Overlap()


def build_optimizer(
    optim: OptimConfig,
    dtype: torch.dtype,
    chunks: list[Any],
    overlap: Overlap,
    adam: type[torch.optim.Optimizer],
    groups: Groups,
) -> Any:
    """Builds the optimizer of a rank's pipeline chunks, wrapped for data parallelism.

    Args:
        dtype: of the weights.
        adam: the class that updates the shards.
    """
    from megatron.core.optimizer import (
        ChainedOptimizer,
        OptimizerConfig,
        ParamGroupOverride,
        ParamKey,
        get_megatron_optimizer,
    )
    from megatron.core.optimizer.optimizer_config import ParamPredicate

    # No weight decay for norms and biases. Megatron-Core decides by shape, but experts' biases are rows of a matrix.
    fixed = ParamPredicate("no_decay", lambda p: p.dim() == 1 or getattr(p, "no_decay", False))
    overrides = {ParamKey(predicate=fixed): ParamGroupOverride(wd_mult=0.0)}  # pyright: ignore[reportCallIssue]
    for role, scale in (("router", optim.router_lr_scale), ("expert", optim.expert_lr_scale)):
        if scale != 1:
            of_role = ParamPredicate(role, partial(_has_role, role=role))
            overrides[ParamKey(predicate=of_role)] = ParamGroupOverride(max_lr=scale * optim.lr)  # pyright: ignore[reportCallIssue]
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        # Also with dp = 1: one code path and one checkpoint format.
        use_distributed_optimizer=True,
        overlap_param_gather=overlap.param_gather,
    )
    keep_from_compiler()
    with cuda_type_names():
        optimizer = get_megatron_optimizer(
            config, chunks, overrides, use_gloo_process_groups=False, pg_collection=optimizer_groups(groups)
        )
    assert isinstance(optimizer, ChainedOptimizer)
    betas = optim.beta1, optim.beta2
    for part in optimizer.chained_optimizers:
        set_optimizer_class(part, adam, lr=optim.lr, weight_decay=optim.weight_decay, betas=betas, eps=optim.eps)
    if adam is torch.optim.AdamW:  # the FusedAdams of TransformerEngine and Apex have no such option
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _has_role(parameter: torch.nn.Parameter, role: str) -> bool:
    return getattr(parameter, "role", None) == role


def set_rates(optimizer: Any, optim: OptimConfig, lr: float) -> None:
    """Before a step: the learning rate and the weight decay of every group of parameters.

    Args:
        lr: the schedule's.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["max_lr"] / optim.lr)  # max_lr is lr but for groups with a scale of their own
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]  # wd_mult is 0 for norms and biases
