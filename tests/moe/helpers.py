"""What the tests of the model share: tiny models, their weights in float64, and one measure of closeness."""

import importlib.util
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from conf.schema import Config, ModelConfig, MoeConfig
from models.decoder import ModelBuildContext, ModelChunk
from models.init import initialise
from models.megatron_config import transformer_config
from moe.layer import MoELayer
from moe.shared_experts import SharedExperts
from ops.experts import EXPERTS, LOOP, ExpertBackend
from ops.implementations import Ops
from ops.operation import Operation, Row
from ops.permute import PermutedTokens, PermuteIndices
from ops.registry import candidates, examine, select
from ops.run_context import RunContext
from parallel.batch_context import DEFAULT_CONTEXT, BatchContext
from parallel.process_groups import Runtime
from tests.moe.reference import Weights

PACKAGES = {"triton": "triton", "grouped_mm_fused": "triton", "te": "transformer_engine"}
IN_FP32 = ["loop", *(i.name for i in EXPERTS.implementations)]
"""tests/ops/test_cpp.py has the other."""
CPU = torch.device("cpu")


def _runs(backend: str) -> bool:
    return backend not in PACKAGES or importlib.util.find_spec(PACKAGES[backend]) is not None


EVERY_BACKEND = [
    pytest.param(name, marks=pytest.mark.skipif(not _runs(name), reason=f"{PACKAGES.get(name)} is not installed"))
    for name in IN_FP32
]
BACKENDS_THAT_RUN = [name for name in IN_FP32 if _runs(name)]


def tiny(moe: MoeConfig | None = None, **settings: object) -> ModelConfig:
    """A model of a few hundred weights. They are large (init_scale), so that softmax and activations bend."""
    small = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 12, "vocab_size": 16}
    return ModelConfig(**{**small, "init_scale": 4.0, "moe": moe or MoeConfig(), **settings})


def run_context(
    model: ModelConfig,
    runtime: Runtime,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    **settings: object,
) -> RunContext:
    """What implementations are chosen for.

    Args:
        device: one to pretend.
        settings: parts of the configuration.
    """
    return RunContext(Config(model=model, **settings), replace(runtime, device=device or runtime.device), dtype)


def selected(operation: Operation, context: RunContext, memory: object = None) -> tuple[object, Row]:
    """The implementation of one operation, and its row of the start table."""
    chosen, (row,) = select([operation], context, memory)
    return chosen[operation.field], row


def try_on(device: torch.device, operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trials run there, whatever device is pretended."""
    trial = operation.trial

    def here(implementation: object, context: RunContext) -> list[Tensor]:
        return trial(implementation, replace(context, runtime=replace(context.runtime, device=device)))

    monkeypatch.setattr(operation, "trial", here)


def expert_backend(name: str) -> ExpertBackend:
    """Of model.moe.backend=name, without a trial."""
    found = [i.loaded(SimpleNamespace(device=CPU)) for i in candidates(EXPERTS) if i.name == name]
    return found[0] if found else LOOP


def sparse_layer(
    model: ModelConfig,
    runtime: Runtime,
    *,
    backend: str | ExpertBackend = "loop",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> MoELayer:
    core = transformer_config(model, runtime, dtype, deterministic=False)
    layer = MoELayer(
        model,
        ops=Ops(experts=expert_backend(backend) if isinstance(backend, str) else backend),
        dtype=dtype,
        sequence_parallel=False,
        groups=runtime.groups,
        draws=(seed, 0),
        shared=SharedExperts(model, core, runtime.groups) if model.moe.num_shared_experts else None,
    )
    initialise(layer.to(runtime.device), seed)
    return layer


def run_layer(layer: MoELayer, x_SBD: Tensor, batch_ctx: BatchContext = DEFAULT_CONTEXT) -> Tensor:
    """What a block does with it: the output, after what was counted is recorded."""
    out_SBD, report = layer(x_SBD, batch_ctx)
    layer.record(report, batch_ctx)
    return out_SBD


def build_context(
    model: ModelConfig, runtime: Runtime, dtype: torch.dtype = torch.float32, seed: int = 1, **ops: object
) -> ModelBuildContext:
    backend = _default_backend(runtime.device, dtype, model.activation)
    core = transformer_config(model, runtime, dtype, deterministic=False)
    return ModelBuildContext(model, core, runtime, seed, Ops(**{"experts": backend} | ops))


@cache
def _default_backend(device: torch.device, dtype: torch.dtype, activation: str) -> ExpertBackend:
    """What a run takes without measuring."""
    groups = SimpleNamespace(etp=SimpleNamespace(size=lambda: 1))
    context = RunContext(
        Config(model=tiny(activation=activation)), SimpleNamespace(device=device, groups=groups), dtype
    )
    verified = examine(EXPERTS, context).verified.values()
    return next(backend for implementation, backend, _ in verified if implementation.is_default(context))


def whole_model(
    model: ModelConfig,
    runtime: Runtime,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_length: int = 16,
    document_mask: bool = False,
    seed: int = 1,
) -> ModelChunk:
    """All layers: the chunk of a single pipeline stage."""
    context = build_context(model, runtime, dtype, seed)
    return ModelChunk(context, chunk=0, sequence_length=sequence_length, document_mask=document_mask)


def fp8_weight_bytes(module: nn.Module) -> int:
    """Of the weights in FP8 that lie beside the parameters, whatever their backend keeps; views count once."""
    sides = []
    for parameter in module.parameters():
        if "kept_weight" in vars(parameter):
            weight = parameter.kept_weight.weight
            sides += [weight.forward, weight.back]
    tensors = [t for side in sides for t in ([side] if isinstance(side, Tensor) else vars(side).values())]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def as_routed(x_RD: Tensor) -> PermutedTokens:
    """Rows in the order in which they lie."""
    return PermutedTokens(x_RD, PermuteIndices(torch.arange(len(x_RD), device=x_RD.device), 1))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def force_experts(layer: MoELayer, x_SBD: Tensor, experts: list[int]) -> Tensor:
    """Sets the router and returns inputs such that the i-th token's likeliest expert is experts[i]: as many of the
    features as there are experts name the expert, the rest stays as it was."""
    num_experts = layer.moe.num_experts
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :num_experts] = 3 * torch.eye(num_experts)
    named = x_SBD.detach().clone()
    flat_TD = named.view(-1, named.shape[-1])
    flat_TD[:, :num_experts] = torch.eye(num_experts, device=named.device)[torch.tensor(experts)]
    return named


def randomise_biases(layer: MoELayer) -> None:
    """The experts' biases start as zeros, which would hide them."""
    for seed, bias in enumerate(b for b in (layer.experts.b_in, layer.experts.b_out) if b is not None):
        bias.data.copy_(random(*bias.shape, seed=seed))


def in_float64(module: nn.Module) -> Weights:
    """Copies of the weights to feed the reference, which will hold its gradients."""
    return {n: p.detach().cpu().double().requires_grad_() for n, p in module.named_parameters()}


def assert_close(got: Tensor | None, wanted: Tensor | None, tolerance: float = 1e-5, least: float = 0.0) -> None:
    """The largest error, relative to the largest value: fp32 rounding does not know how small a single value is. Where
    the reference has only zeros, or no gradient at all, nothing but zero passes.

    Args:
        least: what the largest value counts as where it is smaller but not zero.
    """
    assert got is not None
    wanted = torch.zeros_like(got, dtype=torch.float64) if wanted is None else wanted
    got = got.detach().cpu().double()
    assert got.shape == wanted.shape
    if not got.numel():
        return
    error, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert error <= tolerance * (largest and max(largest, least)), (
        f"off by {error:.2e}, where the largest value is {largest:.2e}"
    )


def assert_gradients_close(module: nn.Module, reference: Weights, summands: dict[str, float] | None = None) -> None:
    """summands: the size of what a parameter's gradient is the sum of, where they may all but cancel."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        try:
            assert_close(parameter.grad, reference[name].grad, least=(summands or {}).get(name, 0.0))
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
