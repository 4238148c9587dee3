"""The memory estimate against what ranks really hold, and the verdicts made from it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.schema import (
    ClusterConfig,
    Config,
    Fp8Config,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from tests.moe.helpers import fp8_weight_bytes
from training.kept_activations import Activations
from training.live_storages import LiveStorages
from training.memory_estimate import Memory, _fp8_weights, memory_per_rank
from training.run_summary import summarize_run

LATE = {"every": 1, "first_dense_layers": 1}
LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
KEPT = ("weights", "gradients", "optimizer", "fp8_weights")


def config(precision: str, moe: dict[str, Any] | None = None, **model: Any) -> Config:
    """Large enough that paddings and odd tensors do not count."""
    # What the logits take while the loss is computed is not kept in the tensors looked at here: few of them.
    sizes = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 192, "vocab_size": 64, **model}
    experts = MoeConfig(**{"num_experts": 4, "every": 2, "backend": "loop", "force_balance": True, **(moe or {})})
    train = TrainConfig(sequence_length=128, micro_batch_size=2, global_batch_size=16)
    return Config(model=ModelConfig(**sizes, moe=experts), train=train, precision=precision)


def held(world: World, settings: Config) -> Memory:
    """What this rank holds (rank function for the pool)."""
    from training import builder
    from training.output_redirect import redirect_output

    redirection = redirect_output(world.rank)
    built = builder.start(settings, world, train=True)
    engine = built.engine
    parameters = [p for module in engine.modules for p in module.parameters()]
    shape = (settings.train.micro_batch_size, settings.train.sequence_length)
    batch = {name: torch.randint(0, 64, shape) for name in ("tokens", "labels")}
    batch |= {"positions": torch.arange(shape[1]).expand(shape), "loss_mask": torch.ones(shape)}
    micro_batches = settings.train.global_batch_size // (shape[0] * built.runtime.layout.dp)
    stage = engine.modules[-1]
    live = LiveStorages([*stage.parameters(), *stage.buffers()])
    forward, kept = stage.forward, 0

    def watched(*args: Any, **named: Any) -> torch.Tensor:
        nonlocal kept
        before = live.total()
        out = forward(*args, **named)
        kept = live.total() - before
        return out

    stage.forward = watched
    with live:
        engine.forward_backward([batch], step=1)
    stage.forward = forward
    fp8_weights = sum(map(fp8_weight_bytes, engine.modules))
    engine.forward_backward([batch] * micro_batches, step=1)
    engine.update(1e-3, loss=1.0)
    buffers = [b for chunk in engine.chunks for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    optimizer = 0
    for part in engine.optimizer.chained_optimizers:
        optimizer += sum(_bytes(v) for s in part.optimizer.state.values() for v in s.values() if v.dim())
        optimizer += sum(_bytes(p) for group in part.shard_fp32_from_float16_groups for p in group)
    result = Memory(
        weights=sum(map(_bytes, parameters)),
        gradients=sum(_bytes(b.grad_data) for b in buffers),
        optimizer=optimizer,
        activations=kept - fp8_weights,
        fp8_weights=fp8_weights,
    )
    builder.stop()
    redirection.undo()
    return result


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


BIASES = {
    "norm": "layernorm",
    "head_bias": True,
    "attention_sinks": True,
    "attention_output_bias": True,
    "ffn_bias": True,
    "sliding_window": 16,
}

NOPE = {"qk_norm": "l2", "no_rope_every": 2, "attention_temperature": 0.1, "attention_temperature_tokens": 8}
NOPE |= {"attention_output_gate": "elementwise"}


@pytest.mark.parametrize(
    ("precision", "moe", "model"),
    [
        ("fp32", {}, {}),
        ("bf16", {"num_experts": 0}, {"num_query_groups": 2, "activation": "relu", "head_dim": 96, "qk_norm": "head"}),
        ("bf16", {"every": 1, "top_k": 2, "num_shared_experts": 1}, {}),
        ("bf16", {"num_shared_experts": 1, "ffn_hidden_size": 64, "shared_ffn_hidden_size": 320, **LATE}, {}),
        ("bf16", {}, {"recompute": ["norm", "activation"]}),
        ("fp32", {}, {"recompute": ["full"]}),
        ("bf16", {}, {"num_query_groups": 2, "attention_bias": True, "clip_qkv": 1.0, "qk_norm": "full"}),
        ("fp8", {"every": 1, "top_k": 2, "capacity_factor": None}, {}),
        ("bf16", {"num_shared_experts": 1, "router_bias": True, "expert_bias": True}, BIASES),
        ("bf16", {"every": 1, "top_k": 2, "gate_on": "input"}, NOPE),
        ("bf16", {"num_experts": 0}, {**LATENT, "q_lora_rank": 96}),
        ("fp8", {"every": 1}, LATENT),
        ("bf16", {}, {"mtp_num_layers": 2}),
        ("bf16", {}, {"mtp_num_layers": 1, "recompute": ["norm"]}),
    ],
    ids=[
        *("switch", "dense", "shared", "widths", "recompute", "recompute full", "clipped", "fp8", "biases"),
        *("gated inputs", "mla", "mla fp8", "mtp", "mtp recompute"),
    ],
)
def test_one_rank_holds_what_is_estimated(
    precision: str, moe: dict[str, Any], model: dict[str, Any], ranks: RankPool
) -> None:
    settings = config(precision, moe, **model)
    found = ranks.run(1, held, settings, timeout=60)[0]
    estimate = memory_per_rank(settings, Layout(1), bf16=precision != "fp32")
    for part in KEPT:
        assert getattr(estimate, part) == pytest.approx(getattr(found, part), rel=0.02), part
    of = Activations(settings, Layout(1), bf16=precision != "fp32", on_gpu=False)
    layers = settings.model.num_layers + settings.model.mtp_num_layers
    sparse = [settings.model.is_sparse(layer) for layer in range(layers)]
    kept = sum(of.layer(sparse=s) for s in sparse) + of.shared() + of.head()
    # Emulated FP8, which is for tests, keeps rounded copies that the estimate leaves out.
    assert kept == pytest.approx(found.activations, rel=0.25 if precision == "fp8" else 0.05)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(8),
        LoraConfig(8, dropout=0.1),
        LoraConfig(8, dora=True, target=["*", "!*.experts.*"]),
        LoraConfig(8, target=["*.attention.*"]),
    ],
    ids=["all layers", "dropout", "dora", "attention"],
)
def test_one_rank_with_adapters_holds_what_is_estimated(lora: LoraConfig, ranks: RankPool) -> None:
    settings = replace(config("bf16", {"top_k": 2, "num_shared_experts": 1}), lora=lora)
    found = ranks.run(1, held, settings, timeout=60)[0]
    estimate = memory_per_rank(settings, Layout(1), bf16=True)
    for part in KEPT:
        assert getattr(estimate, part) == pytest.approx(getattr(found, part), rel=0.02), part
    of = Activations(settings, Layout(1), bf16=True, on_gpu=False)
    kept = sum(of.layer(sparse=settings.model.is_sparse(layer)) for layer in range(settings.model.num_layers))
    kept += of.shared() + of.head() - of.before_adapters()
    assert kept == pytest.approx(found.activations, rel=0.05)


SMALL = OptimConfig(grad_dtype="bf16", state_dtype="bf16")


def test_states_in_bf16_are_held_as_estimated(ranks: RankPool) -> None:
    """2 bytes of weight, 2 of gradient, 4 of master copy and 4 of moments a parameter, instead of 18."""
    settings = replace(config("bf16", {"every": 1}), optim=SMALL)
    found = ranks.run(1, held, settings, timeout=60)[0]
    estimate = memory_per_rank(settings, Layout(1), bf16=True)
    for part in KEPT:
        assert getattr(estimate, part) == pytest.approx(getattr(found, part), rel=0.02), part
    assert (estimate.weights, estimate.optimizer) == (estimate.gradients, 4 * estimate.weights)


@pytest.mark.parametrize("degrees", [{}, {"tp": 2, "ep": 2}])
@pytest.mark.parametrize(("moe", "model"), [({"num_shared_experts": 1, "expert_bias": True}, {}), ({}, LATENT)])
def test_muon_keeps_one_tensor_of_a_matrix(
    degrees: dict[str, int], moe: dict[str, Any], model: dict[str, Any], ranks: RankPool
) -> None:
    settings = replace(config("bf16", moe, **model), parallel=ParallelConfig(**degrees), optim=OptimConfig("muon"))
    size = 2 if degrees else 1
    found = max(memory.optimizer for memory in ranks.run(size, held, settings, timeout=120))
    layout = Layout.of(settings.parallel, size)
    estimate = memory_per_rank(settings, layout, bf16=True).optimizer
    assert estimate == pytest.approx(found, rel=0.02)
    settings.optim = OptimConfig()
    assert estimate < 0.72 * memory_per_rank(settings, layout, bf16=True).optimizer  # 8 bytes instead of 12


def test_offloaded_states_are_the_hosts() -> None:
    settings = replace(config("bf16"), cluster=H100)
    plain = memory_per_rank(settings, Layout(2), bf16=True)
    on_cpu = memory_per_rank(settings, Layout(2), bf16=True, on_gpu=False)
    settings.optim = OptimConfig(cpu_offload=True)
    memory = memory_per_rank(settings, Layout(2), bf16=True)
    assert (memory.optimizer, memory.host) == (0, plain.optimizer) and plain.host == 0
    assert memory.total == plain.total - plain.optimizer
    assert memory_per_rank(settings, Layout(2), bf16=True, on_gpu=False) == on_cpu  # a CPU's memory is the host's
    (row,) = [row for row in summarize_run(settings, Layout(2), 10**9)[0] if row[0] == "memory"]
    assert row[2].endswith(f"; and {plain.optimizer / 1e9:.3g} GB of host memory for the optimizer")


@pytest.mark.parametrize(("recipe", "linear_layers"), [("blockwise", True), ("rowwise", True), ("blockwise", False)])
def test_weights_are_held_in_fp8_as_well(recipe: str, linear_layers: bool, ranks: RankPool) -> None:
    """Of three layers in four: the second pipeline stage has one of them, the first two."""
    settings = config("fp8", {"num_shared_experts": 1}, num_query_groups=2)
    fp8 = Fp8Config(recipe=recipe, last_layers_high=1, linear_layers=linear_layers)
    parallel = ParallelConfig(pp=2, ep=2)
    settings = replace(settings, fp8=fp8, parallel=parallel)
    found = [m.fp8_weights for m in ranks.run(4, held, settings, timeout=120)]
    layout = Layout.of(parallel, 4)
    estimate = [_fp8_weights(settings, layout, stage) for stage in range(2)]
    assert sorted(set(found)) == sorted(estimate) and len(set(found)) == 2
    assert memory_per_rank(settings, layout, bf16=True).fp8_weights in estimate


@pytest.mark.parametrize("degrees", [{"tp": 2, "ep": 2}, {"pp": 2, "etp": 2}])
def test_the_fullest_rank_of_a_layout_holds_what_is_estimated(degrees: dict[str, int], ranks: RankPool) -> None:
    settings = replace(config("bf16"), parallel=ParallelConfig(**degrees))
    found = ranks.run(4, held, settings, timeout=120)
    estimate = memory_per_rank(settings, Layout.of(settings.parallel, 4), bf16=True)
    for part in KEPT:
        # Gradient buckets and optimizer shards are cut at round numbers.
        assert getattr(estimate, part) == pytest.approx(max(getattr(m, part) for m in found), rel=0.05), part


H100 = ClusterConfig("h100", 8, True, 80.0, 14, 450.0, 50.0)


def test_what_cannot_fit_is_refused_and_what_may_not_is_told() -> None:
    model = ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=14336)
    settings = replace(config("bf16"), model=model, cluster=H100)
    with pytest.raises(ValueError, match=r"weights, gradients and optimizer take \d+ GB per rank, more than the 80 GB"):
        summarize_run(settings, Layout(1), 10**9)
    settings.optim = replace(SMALL)
    with pytest.raises(ValueError, match=r"more ranks; settings that reduce memory: optim.cpu_offload=true$"):
        summarize_run(settings, Layout(1), 10**9)
    settings = replace(settings, parallel=ParallelConfig(tp=8))
    settings.train.micro_batch_size = settings.train.global_batch_size = 64
    settings.train.sequence_length = 4096
    _, warnings = summarize_run(settings, Layout(8, tp=8), 10**9)
    assert len(warnings) == 1 and "memory is likely to run out" in warnings[0]
    assert "80 GB (h100)" in str(summarize_run(settings, Layout(8, tp=8), 10**9)[0])


def test_links_are_told() -> None:
    settings = replace(config("bf16"), cluster=H100, parallel=ParallelConfig(tp=16))
    rows, _ = summarize_run(settings, Layout(16, tp=16), 10**9)
    assert not any(row[0] == "gradients" for row in rows)
    # 2 (n - 1) / n of the bytes over the slowest link, worked out by hand for two nodes of eight.
    settings = replace(settings, parallel=ParallelConfig())
    memory = memory_per_rank(settings, Layout(16), bf16=True)
    milliseconds = 1e3 * 2 * 15 / 16 * memory.gradients / 50e9
    (row,) = [row for row in summarize_run(settings, Layout(16), 10**9)[0] if row[0] == "gradients"]
    assert row[2] == f"{milliseconds:.3g} ms at the 50 GB/s of the network"
