"""Every operation of the registry takes an implementation that computes what its reference does, and no other."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.schema import DataConfig, MoeConfig, OptimConfig
from models.operations import OPERATIONS, select_ops
from moe.router import Router
from ops.experts import LOOP, ExpertBackend
from ops.gemm_backend import Reference
from ops.implementations import DEFAULT_OPS
from ops.linear import MEGATRON_LAYERS
from ops.norm import torch_rms_norm
from ops.operation import Implementation, Operation
from ops.permute import TORCH_PERMUTATION
from ops.routing import Routing
from ops.run_context import RunContext
from parallel.batch_context import TRAIN
from parallel.block_update import UpdateBlock, in_torch
from parallel.optimizers import OPTIMIZERS
from parallel.process_groups import Runtime
from tests.moe.helpers import run_context, tiny

WRONG = 1.1
"""What the results of a wrong implementation, or their gradients, are multiplied by."""


def times(function: Callable[..., torch.Tensor], factor: float) -> Callable[..., torch.Tensor]:
    return lambda *arguments: function(*arguments) * factor


def rotary(factor: float, context: RunContext) -> Callable[..., torch.Tensor]:
    """Wrong: its backward pass rotates forward."""

    def apply(*arguments: torch.Tensor, backward: bool = False) -> torch.Tensor:
        return DEFAULT_OPS.apply_rotary(*arguments, backward=backward and factor == 1)

    return apply


def permutation(factor: float, context: RunContext) -> object:
    rows = {name: getattr(TORCH_PERMUTATION, name) for name in ("permute", "unpermute")}
    return SimpleNamespace(**rows, permute_backward=times(TORCH_PERMUTATION.permute_backward, factor))


def route(factor: float, context: RunContext) -> Callable[..., Routing]:
    router = Router(context.model, sequence_parallel=False, groups=context.groups)

    def route(logits_TE: torch.Tensor, bias_E: None, padding_T: Any, rule: object, sequences: int) -> Routing:
        routing = router.route(logits_TE, padding_T, TRAIN, sequences)
        return replace(routing, gates_TK=routing.gates_TK * factor)

    return route


def float8(factor: float, context: RunContext) -> object:
    class Off(Reference):
        def product(self, *operands: Any) -> torch.Tensor:
            return super().product(*operands) * factor

    (operation,) = (o for o in OPERATIONS if o.field == "float8")
    plain = operation.reference(context).loaded(context)
    return replace(plain, linear=Off(plain.linear.recipe))


def dispatcher(factor: float, context: RunContext) -> Callable[..., object]:
    (operation,) = (o for o in OPERATIONS if o.field == "dispatcher")
    make = operation.reference(context).loaded(context)

    def made(*arguments: Any) -> object:
        plain = make(*arguments)
        return SimpleNamespace(start=plain.start, finish=plain.finish, combine=times(plain.combine, factor))

    return made


def adamw(factor: float, context: RunContext) -> type[torch.optim.Optimizer]:
    class AdamW(torch.optim.AdamW):
        def __init__(self, weights: Any, lr: float, **settings: Any):
            super().__init__(weights, lr=lr * factor, **settings)

    return AdamW


def update_block(factor: float, context: RunContext) -> UpdateBlock:
    plain = in_torch(OPTIMIZERS["adamw"])
    return lambda block: plain(replace(block, lr=block.lr * factor))


def linear(factor: float, context: RunContext) -> object:
    def column(*how: Any) -> torch.nn.Module:
        layer = MEGATRON_LAYERS.column(*how)
        layer.register_forward_hook(lambda module, inputs, output: (output[0] * factor, output[1]))
        return layer

    plain = MEGATRON_LAYERS
    return SimpleNamespace(has_matmul_ops=True, column=column, row=plain.row, replicated=plain.replicated)


def norm_linear(factor: float, context: RunContext) -> Callable[..., torch.nn.Module]:
    def fused(norm: Any, *how: Any, returns_norm: bool = False) -> torch.nn.Module:
        layer = MEGATRON_LAYERS.column(*how)
        layer.register_forward_pre_hook(lambda module, x: torch_rms_norm(x[0], norm.weight, norm.eps) * factor)
        if returns_norm:
            layer.register_forward_hook(lambda module, inputs, output: (*output, inputs[0]))
        return layer

    return fused


FAKES: dict[str, Callable[[float, RunContext], object]] = {
    "apply_rotary": rotary,
    "permutation": permutation,
    "route": route,
    "float8": float8,
    "experts": lambda factor, context: ExpertBackend(times(LOOP.run, factor)),
    "dispatcher": dispatcher,
    "linear": linear,
    "norm_linear": norm_linear,
    "adamw": adamw,
    "update_block": update_block,
}
"""Of an operation's field; of the others a multiple of what the reference returns."""


APART = {
    "fuse_weight_gradient": "tests/ops/test_weight_gradient.py",
    "te_fp8": "tests/ops/test_te_fp8.py",
    "cp_attention": "tests/ops/test_cp_attention.py",
}
"""Operations whose implementations are no functions to multiply, and where wrong ones are refused."""


@pytest.mark.parametrize("factor", [1.0, WRONG], ids=["right", "wrong"])
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.field not in APART], ids=lambda o: o.field)
def test_only_what_equals_the_reference_is_taken(
    operation: Operation, factor: float, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake implementation comes first."""
    model, is_fp8 = (
        tiny(MoeConfig(num_experts=4, top_k=2), hidden_size=16, ffn_hidden_size=16),
        operation.field == "float8",
    )
    data = DataConfig(document_mask=operation.field == "varlen_attention")
    dtype = torch.bfloat16 if is_fp8 else torch.float32
    optim = OptimConfig(state_dtype="bf16" if operation.field == "update_block" else "fp32")
    context = run_context(model, runtime, dtype, data=data, optim=optim, precision="fp8" if is_fp8 else "fp32")
    plain = operation.reference(context).loaded(context)
    fake = FAKES.get(operation.field, lambda factor, context: times(plain, factor))(factor, context)
    first = Implementation("fake", lambda context: fake)
    monkeypatch.setattr(operation, "implementations", [first, *operation.implementations])
    ops, rows = select_ops(context)
    (row,) = (row for row in rows if row.operation == operation.name)
    if factor == 1:
        assert getattr(ops, operation.field) is fake and "fake" in row.name and not row.refused
    else:
        assert getattr(ops, operation.field) is not fake and "fake" not in row.name
        assert "fake differs from " in row.why and row.refused
