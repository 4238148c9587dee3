"""The C++ kernels, declared as implementations of their operations. Of this folder, ops/registry.py imports this module
alone, and nothing else imports any: without the folder a run takes the next implementation."""

from collections.abc import Callable
from typing import Any

import torch

from ops.cpp import build, operators
from ops.experts import activation_missing
from ops.operation import Implementation, Unavailable
from ops.run_context import RunContext


def native(
    load: str, is_supported: Callable[[RunContext], bool] = lambda context: True, **declared: Any
) -> Implementation[Any]:
    """Declares what `load` names as an implementation for a processor on which only a compiler can be missing."""

    def compiled(context: RunContext) -> Any:
        if reason := operators.unsupported_reason():
            raise Unavailable(reason)
        return Implementation("native", load).loaded(context)

    return Implementation(
        "native",
        compiled,
        device="cpu",
        dtypes=(torch.bfloat16,),
        is_supported=lambda context: not build.missing_instructions() and is_supported(context),
        **declared,
    )


def slower_than_onednn() -> bool:
    """Whether torch's products have matrix instructions that these lack."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _idle_threads(context: RunContext) -> str | None:
    """A backward pass has a thread for each key/value head."""
    groups = context.model.query_groups // context.groups.tp.size()
    heads, threads = context.config.train.micro_batch_size * groups, torch.get_num_threads()
    return f"would leave threads idle: {heads} key/value heads for {threads}" if heads < threads else None


def _jitter(context: RunContext) -> str | None:
    return "takes tokens in bf16, and jitter makes them fp32" if context.model.moe.jitter else None


IMPLEMENTATIONS: dict[str, Implementation[Any]] = {
    "apply_rotary": native("ops.cpp.attention:apply_rotary"),
    "rms_norm": native("ops.cpp.rows:rms_norm"),
    "token_losses": native("ops.cpp.rows:token_losses"),
    "causal_attention": native(
        "ops.cpp.attention:causal_attention",
        is_supported=lambda context: not slower_than_onednn(),
        unsupported_reason=_idle_threads,
    ),
    "permutation": native("ops.cpp.permutation:PERMUTATION"),
    "router_logits": native("ops.cpp.router:router_logits", unsupported_reason=_jitter),
    "experts": native(
        "ops.cpp.experts:EXPERTS",
        why="our products for AVX512-BF16, compiled here",
        unsupported_reason=activation_missing,
        is_default=lambda context: not slower_than_onednn(),
    ),
}
"""By the field of the operation."""
