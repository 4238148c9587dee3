"""The operators torch.ops.switchyard: how they are loaded, and what operators.cpp cannot say of them to PyTorch: their
gradients, and the shapes and strides of their results for meta tensors and torch.compile.

Legend: B batch, H heads, G key/value groups, S sequence, N width of a head, or outer dimension of a product, T tokens,
D hidden, E experts, K inner dimension of a product, R rows, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.cpp import build
from ops.operation import Unavailable

NAMESPACE = torch.ops.switchyard


def unsupported_reason() -> str | None:
    """Why the kernels cannot run here, in words that follow an implementation's name; None: they can."""
    if missing := build.missing_instructions():
        return f"needs a processor with AVX512-BF16; this one lacks {', '.join(missing)}"
    return _load_error()


@functools.cache
def _load_error() -> str | None:
    try:
        load()
    except Unavailable as error:
        return str(error)
    except Exception as error:  # also where there is no home directory
        return f"cannot be compiled, kept or loaded: {error}"
    return None


def load() -> None:
    """Compiles the operators where that was not done yet, and adds them to torch.ops. Once is enough.

    Raises:
        Unavailable: there is no compiler.
        OSError: they cannot be compiled, kept or loaded.
    """
    torch.ops.load_library(build.library())
    _describe()


@functools.cache
def _describe() -> None:
    for name, fake in FAKES.items():
        torch.library.register_fake(f"switchyard::{name}", fake)
    for name, (setup_context, backward) in GRADIENTS.items():
        once = once_differentiable(backward)  # a second derivative is an error, not a gradient that is missing
        torch.library.register_autograd(f"switchyard::{name}", once, setup_context=setup_context)


def _fp32(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)


def _heads(like_BHSN: Tensor) -> Tensor:
    """A token's heads lie side by side, as projections want them."""
    b, h, s, n = like_BHSN.shape
    return like_BHSN.new_empty((s, b, h, n)).permute(1, 2, 0, 3)


def _rows(input_RK: Tensor, rows: Tensor | None) -> int:
    return (input_RK if rows is None else rows).shape[0]


def _nothing(*arguments: object) -> None:
    """Of an operator that writes into an argument."""


FAKES: dict[str, Callable[..., Any]] = {
    "causal_attention": lambda query, key, value: (_heads(query), _fp32(query, *query.shape[:3])),
    "causal_attention_backward": lambda grad, query, key, value, output, logsumexp: tuple(
        map(_heads, (query, key, value))
    ),
    "apply_rotary": _nothing,
    "grouped_product": lambda input, rows, weight, groups: input.new_empty((_rows(input, rows), weight.shape[2])),
    "grouped_weight_gradient": lambda input, rows, grad, groups: input.new_empty(
        (groups.shape[0] - 1, input.shape[1], grad.shape[1])
    ),
    "grouped_weight_gradient_add_": _nothing,
    "activate": lambda input, kind, keep: input.new_empty((input.shape[0], input.shape[2])),
    "activate_backward_": lambda grad, input, kind, keep: input.new_empty(input.shape),
    "gather_rows": lambda source, choice, gates, top_k: source.new_empty((choice.shape[0], source.shape[1])),
    "add_rows": lambda rows, slot, gates, tokens, top_k: rows.new_empty((tokens, rows.shape[1])),
    "gate_gradient": lambda rows, slot, grad, top_k: _fp32(rows, grad.shape[0], top_k),
    "router_logits": lambda input, weight: _fp32(input, input.shape[0], weight.shape[0]),
    "router_logits_backward": lambda grad, input, weight: (input.new_empty(input.shape), _fp32(input, *weight.shape)),
    "cross_entropy_sums": lambda logits, labels: tuple(_fp32(logits, logits.shape[0]) for _ in range(3)),
    "cross_entropy_gradient_": _nothing,
    "rms_norm": lambda input, weight, eps: (input.new_empty(input.shape), _fp32(input, input.shape[0])),
    "rms_norm_backward": lambda grad, input, weight, scale: (
        input.new_empty(input.shape),
        weight.new_empty(weight.shape),
    ),
}
"""What an operator returns, uninitialised, by its name."""


def _keep_attention(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    _only_first(ctx, output)


def _attention_gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, ...]:
    return NAMESPACE.causal_attention_backward.default(grad, *ctx.saved_tensors)


def _keep_router(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _router_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return NAMESPACE.router_logits_backward.default(grad, *ctx.saved_tensors)


def _keep_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    _only_first(ctx, output)


def _norm_gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *NAMESPACE.rms_norm_backward.default(grad, *ctx.saved_tensors), None


def _only_first(ctx: Any, output: tuple[Tensor, Tensor]) -> None:
    """The second output is for the backward pass."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "causal_attention": (_keep_attention, _attention_gradients),
    "router_logits": (_keep_router, _router_gradients),
    "rms_norm": (_keep_norm, _norm_gradients),
}
"""What is kept for the backward pass, and the backward pass. The others are steps of functions that have a backward
pass of their own, which is the same for every backend: ops/grouped_mlp.py, ops/fused_permute.py and
ops/fused_cross_entropy.py; and ops/rotary.py, whose backward pass is the rotation back."""
