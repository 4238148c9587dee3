"""TransformerEngine's layers, with the stand-in for the package: used if they compute the same, left out with the
reason if they do not, refused if they were asked for."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from conf.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    Fp8Config,
    LoraConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
)
from conf.te_rules import te_parts
from models.decoder import ModelChunk
from models.operations import OPERATIONS
from moe.mlp import MLP
from ops import te
from ops.experts import ExpertBackend
from ops.fp8 import Float8
from ops.gemm_backend import Reference
from ops.linear import LINEAR, MEGATRON_LAYERS, LinearSpec
from ops.norm import torch_rms_norm
from ops.norm_linear import NORM_LINEAR
from ops.operation import Operation, Row
from ops.registry import largest_difference
from ops.run_context import RunContext
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import build_context, run_context, selected, tiny, try_on
from tests.parallel.helpers import started
from tests.stand_ins import installed
from tests.stand_ins.signatures import table
from tests.stand_ins.versions import as_version, find
from training.run_summary import summarize_run

CUDA = torch.device("cuda")
MLA = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "num_query_groups": None, "head_dim": None, **MLA}
GATED = {"activation": "swiglu", "ffn_bias": True}
PYTORCH = "transformer_engine.pytorch"
BY_FIELD = {operation.field: operation for operation in OPERATIONS}
OF_LAYERS = ("linear", "norm_linear", "causal_attention", "varlen_attention", "rms_norm")


@pytest.fixture(autouse=True)
def transformer_engine() -> Iterator[None]:
    with installed("transformer_engine"):
        yield


def context_of(runtime: Runtime, field: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> RunContext:
    model = {"hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 4}
    model |= settings.pop("model", {})
    settings = {"precision": "bf16", **settings}
    data = DataConfig(document_mask=field == "varlen_attention")
    return run_context(tiny(MoeConfig(), **model), runtime, dtype, CUDA, data=data, **settings)


@pytest.fixture
def chosen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Row]:
    """The row of an operation, of a run in bf16 on a CPU that pretends to be a GPU, with TransformerEngine's
    implementation and the reference alone."""

    def chosen(field: str, **settings: Any) -> Row:
        operation: Operation[Any] = BY_FIELD[field]
        with monkeypatch.context() as patch:
            patch.setattr(operation, "implementations", [i for i in operation.implementations if i.name == te.NAME])
            try_on(runtime.device, operation, patch)
            return selected(operation, context_of(runtime, field, **settings))[1]

    return chosen


@pytest.mark.parametrize("version", table()["transformer_engine"])
@pytest.mark.parametrize("field", OF_LAYERS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased, layer norm, sinks and a window"])
def test_what_computes_the_same_is_used(chosen: Callable[..., Row], field: str, biased: bool, version: str) -> None:
    """With calls that every recorded version takes."""
    further = {"attention_bias": True, "attention_sinks": True, "sliding_window": 9, "norm_zero_centered": True}
    further |= {} if field == "rms_norm" else {"norm": "layernorm"}
    with as_version("transformer_engine", version) as called:
        if biased and field == "causal_attention":
            further = {"sliding_window": 9}
        row = chosen(field, model=further if biased else {})
    assert row.name == te.NAME and " on a random batch" in row.why and not row.refused
    assert called


@pytest.mark.parametrize("version", table()["transformer_engine"])
@pytest.mark.parametrize("model", [LATENT, GATED, LATENT | {"recompute": ["norm"]}], ids=str)
def test_norms_are_fused_in_every_place(chosen: Callable[..., Row], model: dict[str, Any], version: str) -> None:
    """Between the projections of latent attention, and before gated feed-forward layers, of which two layers read the
    norm's output."""
    with as_version("transformer_engine", version) as called:
        assert chosen("norm_linear", model=model).name == te.NAME
    assert f"{PYTORCH}.LayerNormLinear.forward" in called


class _Scaled(torch.autograd.Function):
    """Wrong by a share of the gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 1.05


def output(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **how: Any) -> Any:
        y = right(*args, **how)
        return (y[0] * 1.05, y[1]) if isinstance(y, tuple) else y * 1.05

    return wrong


def gradient(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x, *args, **how: right(self, _Scaled.apply(x), *args, **how)


def first_micro_batch(right: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the main gradient instead of adding to it."""
    return lambda self, x, *args, **how: right(self, x, True)


def weight_gradient(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weight, gradient_NK, **how: right(weight, gradient_NK * 1.05, **how)


def raises(right: Callable[..., Any]) -> Callable[..., Any]:
    def fails(*args: Any, **how: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device")

    return fails


def no_window(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, window_size=None, **how: right(*args, window_size=(-1, 0), **how)


WRONG = [
    ("linear", "Linear.forward", output),
    ("linear", "Linear.forward", gradient),
    ("linear", "Linear.forward", first_micro_batch),
    ("linear", "products.add_weight_gradient", weight_gradient),
    ("linear", "Linear.forward", raises),
    ("norm_linear", "LayerNormLinear.forward", output),
    ("norm_linear", "LayerNormLinear.forward", gradient),
    ("norm_linear", "LayerNormLinear.forward", first_micro_batch),
    ("norm_linear", "products.add_weight_gradient", weight_gradient),
    ("rms_norm", "RMSNorm", raises),
    ("causal_attention", "DotProductAttention.forward", output),
    ("causal_attention", "DotProductAttention.forward", gradient),
    ("varlen_attention", "DotProductAttention.forward", output),
    ("varlen_attention", "DotProductAttention.forward", gradient),
    ("varlen_attention", "DotProductAttention.forward", no_window),
]


@pytest.mark.parametrize(("field", "name", "how"), WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_what_differs_is_left_out_or_refused(
    chosen: Callable[..., Row], monkeypatch: pytest.MonkeyPatch, field: str, name: str, how: Callable[..., Any]
) -> None:
    """The start table says why; model.transformer_impl=transformer_engine ends the run."""
    owner, attribute = find(f"{PYTORCH}.{name}")
    monkeypatch.setattr(owner, attribute, how(getattr(owner, attribute)))
    model = {"sliding_window": 9} if field == "varlen_attention" else {}
    row = chosen(field, model=model)
    assert row.name != te.NAME and row.refused
    assert f"{te.NAME} {'failed its trial (RuntimeError' if how is raises else 'differs from'}" in row.why
    if field != "rms_norm":  # which is not asked for
        with pytest.raises(
            ValueError, match=r"model.transformer_impl=transformer_engine .*Use model.transformer_impl="
        ):
            chosen(field, model=model | {"transformer_impl": "transformer_engine"})


def test_a_norm_that_is_off_is_left_out(chosen: Callable[..., Row], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch import RMSNorm

    monkeypatch.setattr(RMSNorm, "normed", output(RMSNorm.normed))
    row = chosen("rms_norm")
    assert row.name == "torch rms_norm" and f"{te.NAME} differs from torch's" in row.why and row.refused


def test_local_uses_nothing_of_it(chosen: Callable[..., Row], runtime: Runtime) -> None:
    for field in OF_LAYERS:
        row = chosen(field, model={"transformer_impl": "local"})
        assert row.name != te.NAME and te.NAME not in row.why
    optimizer = context_of(runtime, "adamw", model={"transformer_impl": "local"})
    assert not [i for i in BY_FIELD["adamw"].implementations if "Transformer" in i.name and i.is_supported(optimizer)]
    experts = context_of(runtime, "experts", model={"transformer_impl": "local"})
    assert not [i for i in BY_FIELD["experts"].implementations if i.name == "te" and i.is_supported(experts)]
    evaluation = RunContext(Config(model=tiny()), runtime, torch.bfloat16, train=False)
    assert not te.is_meant(evaluation) and te.asked(evaluation) == "auto"


def test_without_the_package_it_is_asked_for_in_vain(
    chosen: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    for field in OF_LAYERS:
        assert f"not installed: {te.NAME}" in chosen(field).why
    asked = {"transformer_impl": "transformer_engine"}
    with pytest.raises(
        ValueError, match="transformer_engine needs the package transformer-engine, which is not installed"
    ):
        chosen("linear", model=asked)


def test_what_a_fused_norm_hides_is_left_alone(chosen: Callable[..., Row]) -> None:
    row = chosen("norm_linear", model={"recompute": ["norm"]})
    assert row.name == "one after the other" and "keeps what model.recompute=[norm] is to recompute" in row.why
    assert "which adapters read" in chosen("norm_linear", lora=LoraConfig(rank=2)).why


def test_gradients_in_bf16_are_returned(runtime: Runtime) -> None:
    """With optim.grad_dtype=bf16 there is no fp32 main gradient to add to."""
    for grad_dtype in ("fp32", "bf16"):
        context = context_of(runtime, "linear", optim=OptimConfig(grad_dtype=grad_dtype))
        (candidate,) = LINEAR.implementations
        layer = candidate.loaded(context).column(LinearSpec(4, 4, *_how(runtime)))
        assert layer.fuse_wgrad_accumulation == (grad_dtype == "fp32")


def test_layers_in_fp8_keep_megatrons(runtime: Runtime) -> None:
    """Whose products the FP8 backend replaces; the other layers are TransformerEngine's."""
    context = context_of(runtime, "linear")
    by_te = {o.field: o.implementations[0].loaded(context) for o in (LINEAR, NORM_LINEAR)}
    float8 = Float8(ExpertBackend.on(Reference()), Reference(), range(1))
    built = build_context(tiny(), runtime, float8=float8, **by_te)
    blocks = ModelChunk(built, chunk=0, sequence_length=16, document_mask=False).layers
    kept = [isinstance(layer, ColumnParallelLinear) for b in blocks.values() for layer in (b.attention.qkv, b.ffn.up)]
    assert kept == [True, True, False, False]
    assert [(b.norm_is_fused, b.ffn.norm_is_fused) for b in blocks.values()] == [(False, False), (True, True)]


RUNS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "local": {"model": {"transformer_impl": "local"}},
    "norms recomputed": {"model": {"recompute": ["norm"]}},
    "adapters": {"lora": LoraConfig(rank=2)},
    "latent": {"model": LATENT},
    "latent, norms recomputed": {"model": LATENT | {"recompute": ["norm"]}},
    "latent, adapters": {"model": LATENT, "lora": LoraConfig(rank=2)},
    "fp8": {"precision": "fp8"},
    "fp8, one layer high": {"precision": "fp8", "fp8": Fp8Config(first_layers_high=1)},
    "fp8 experts": {"precision": "fp8", "fp8": Fp8Config(linear_layers=False)},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_check_on_a_login_node_foretells_the_start_table(
    chosen: Callable[..., Row], runtime: Runtime, settings: dict[str, Any]
) -> None:
    context = context_of(runtime, "linear", **settings)
    used = [f for f in ("linear", "norm_linear", "causal_attention") if BY_FIELD[f].is_used(context)]
    rows = [chosen(field, **settings) for field in used]
    assert [row.operation for row in rows if row.name == te.NAME] == te_parts(context.config)
    settings = dataclasses.replace(context.config, cluster=ClusterConfig(gpus=True), data=DataConfig())
    table, _ = summarize_run(settings, Layout(1), 10**9)
    assert [row[1] for row in table if row[0] == te.NAME] == [", ".join(te_parts(settings)) or "nothing"]


def _how(runtime: Runtime) -> tuple[bool, Any, Any]:
    from models.megatron_config import transformer_config

    config = transformer_config(tiny(), runtime, torch.float32, deterministic=False)
    return False, config, runtime.groups.tp


def trials(world: World, parallel: ParallelConfig) -> dict[str, float]:
    """The difference of each operation from the reference in fp32 (rank function)."""
    with installed("transformer_engine"), started(world, parallel) as runtime:
        found = {}
        for operation in (LINEAR, NORM_LINEAR):
            for model in ({}, {"attention_bias": True, "norm": "layernorm"}, LATENT):
                context = context_of(runtime, operation.field, torch.float32, model=model, parallel=parallel)
                (candidate,), plain = operation.implementations, operation.reference(context)
                results = [
                    operation.trial(i.loaded(context), RunContext(context.config, runtime, torch.float32))
                    for i in (candidate, plain)
                ]
                found[f"{operation.field} {model}"] = largest_difference(*results)
        return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_trial_covers_the_collectives(ranks: RankPool, sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    for found in ranks.run(2, trials, parallel, timeout=120):
        assert len(found) == 6 and max(found.values()) < 1e-6


def test_recomputing_the_activation_repeats_no_product(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are no operators of PyTorch: what is dropped is recomputed from what they returned."""
    from transformer_engine.pytorch.products import LinearProduct

    results, products = [], []
    for recompute in ([], ["activation"]):
        model = tiny(recompute=recompute, activation="swiglu")
        (candidate,) = LINEAR.implementations
        layers = candidate.loaded(context_of(runtime, "linear", optim=OptimConfig(grad_dtype="bf16")))
        how = _how(runtime)
        layer = MLP(model, how[1], runtime.groups, linear=layers)
        with torch.no_grad():
            for seed, parameter in enumerate(layer.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        count, right = [0], LinearProduct.forward

        def counted(*args: Any, count: list[int] = count, right: Callable[..., Any] = right) -> Tensor:
            count[0] += 1
            return right(*args)

        with monkeypatch.context() as patch:
            patch.setattr(LinearProduct, "forward", staticmethod(counted))
            x_SBD = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(9)).requires_grad_()
            y_SBD = layer(x_SBD)
            y_SBD.square().sum().backward()
        results.append([y_SBD, x_SBD.grad, *(p.grad for p in layer.parameters())])
        products.append(count[0])
    assert products == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_norm_keeps_its_name_and_is_one_parameter(runtime: Runtime) -> None:
    """Fused, the layer holds the norm's own parameter: checkpoints, the optimizer and Megatron-Core's marks see one."""
    (candidate,) = NORM_LINEAR.implementations
    fused = candidate.loaded(context_of(runtime, "norm_linear"))
    block = nn.Module()
    block.norm = nn.Module()
    block.norm.weight, block.norm.eps, block.norm.zero_centered = nn.Parameter(torch.rand(8)), 1e-5, False
    block.qkv = fused(block.norm, LinearSpec(8, 12, *_how(runtime)))
    assert [name for name, _ in block.named_parameters()] == ["norm.weight", "qkv.weight"]
    x = torch.randn(3, 1, 8)
    plain = MEGATRON_LAYERS.column(LinearSpec(8, 12, *_how(runtime)))
    with torch.no_grad():
        plain.weight.copy_(block.qkv.weight.normal_())
        wanted = plain(torch_rms_norm(x, block.norm.weight, 1e-5))[0]
    torch.testing.assert_close(block.qkv(x)[0], wanted)
