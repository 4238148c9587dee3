"""Weight gradients that Megatron-Core's linear layers add to the main gradients within their product."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import OptimConfig, ParallelConfig
from ops.operation import Row
from ops.weight_gradient import WEIGHT_GRADIENT
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import run_context, selected, tiny
from tests.parallel.helpers import Variant, build_engine, gradients, my_batches, started
from tests.stand_ins import installed

Accumulate = Callable[[Tensor, Tensor, Tensor], Any]


@contextmanager
def found_by_megatron(**functions: Accumulate) -> Iterator[None]:
    """Inside, Megatron-Core's layers have found the extension when they were imported.

    Args:
        functions: in place of the stand-in's.
    """
    from megatron.core.tensor_parallel import layers

    with installed("apex"), pytest.MonkeyPatch.context() as patch:
        import fused_weight_gradient_mlp_cuda as extension

        extension = SimpleNamespace(**{**vars(extension), **functions})
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", extension, raising=False)
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        yield


def chosen(runtime: Runtime, dtype: torch.dtype = torch.float32, grad_dtype: str = "fp32") -> tuple[Any, Row]:
    context = run_context(tiny(hidden_size=32), runtime, dtype, optim=OptimConfig(grad_dtype=grad_dtype))
    return selected(WEIGHT_GRADIENT, context)


def test_without_the_extension(runtime):
    fused, row = chosen(runtime)
    assert fused is False and row.name == "added by Megatron-Core's hook" and not row.refused
    assert row.why == "not installed: Apex's fused_weight_gradient_mlp_cuda"


def test_an_extension_that_megatron_has_not_found(runtime):
    with installed("apex"):
        fused, row = chosen(runtime)
    assert fused is False and row.refused
    assert row.why == "Apex's fused_weight_gradient_mlp_cuda was not found when Megatron-Core was imported"


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16")]
)
def test_one_that_computes_the_same_is_used(runtime, dtype, grad_dtype):
    with found_by_megatron():
        fused, row = chosen(runtime, dtype, grad_dtype)
    assert fused is True and row.name == "added within the product, Apex" and row.why.startswith("equals torch's")


WRONG = {
    "overwrites": lambda x, dy, main: main.copy_(dy.t() @ x),
    "does nothing": lambda x, dy, main: None,
    "is 3 % off": lambda x, dy, main: main.add_(dy.t() @ x, alpha=1.03),
    "takes the operands the other way": lambda x, dy, main: main.add_((x.t() @ dy).reshape(main.shape)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_one_that_is_off_is_left_out(runtime, wrong):
    for dtype in (torch.float32, torch.bfloat16):
        with found_by_megatron(wgrad_gemm_accum_fp32=wrong):
            fused, row = chosen(runtime, dtype)
        assert fused is False and "differs from torch's by" in row.why and row.refused


def test_the_one_for_bf16_gradients_is_tried_where_gradients_are_bf16(runtime):
    with found_by_megatron(wgrad_gemm_accum_fp16=WRONG["overwrites"]):
        assert chosen(runtime, torch.bfloat16, "fp32")[0] is True
        assert chosen(runtime, torch.bfloat16, "bf16")[0] is False


def model_gradients(runtime: Runtime, *, fused: bool, **model: Any) -> tuple[dict[str, Tensor], int]:
    """(the gradients of a step of four micro-batches, how many products the extension has added up)."""
    calls = []

    def counted(x: Tensor, dy: Tensor, main: Tensor) -> None:
        calls.append(main.shape)
        main.add_(dy.t() @ x)

    with found_by_megatron(wgrad_gemm_accum_fp32=counted):
        engine = build_engine(runtime, Variant(model=model, fuse_weight_gradient=fused))
        engine.forward_backward(my_batches(runtime, 1), step=1)
    return gradients(engine), len(calls)


def both_ways(world: World, parallel: ParallelConfig, model: dict[str, Any]) -> tuple[float, int, int]:
    """(the largest relative difference of a parameter's gradient, products added up plainly and fused) of one rank."""
    with started(world, parallel) as runtime:
        (wanted, plain), (got, fused) = (model_gradients(runtime, fused=fused, **model) for fused in (False, True))
    assert got.keys() == wanted.keys()
    differences = [(got[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12) for name in wanted]
    return max(differences).item(), plain, fused


MODELS = {
    # Autograd sums the gradients of a tied embedding, which only the layer's half is added up of.
    "tied": {"tie_embeddings": True},
    "tied, used three times": {"tie_embeddings": True, "mtp_num_layers": 2},
    "biases and full recompute": {"attention_bias": True, "recompute": ["full"]},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_gradient_of_a_model_is_the_same(ranks: RankPool, model: dict[str, Any]) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    for difference, plain, fused in ranks.run(2, both_ways, parallel, model, timeout=120):
        assert difference < 1e-5 and plain == 0 and fused >= 4 * (2 * 4 + 1)
