"""The whole decoder against the float64 reference, its causality, and what it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ModelConfig, MoeConfig
from models.decoder import ModelChunk
from parallel.batch_context import EVALUATE, GENERATE, BatchContext
from parallel.process_groups import Runtime
from tests.models import reference
from tests.moe.helpers import assert_close, assert_gradients_close, in_float64, random, tiny, whole_model
from training.flops import attention_span, model_cost

DROPPING = MoeConfig(num_experts=4, top_k=2, every=2, capacity_factor=0.75, aux_loss_coeff=0.3, z_loss_coeff=0.1)
MULTIPLIERS = {"embedding_multiplier": 1.7, "attention_multiplier": 0.3, "residual_multiplier": 0.6}
MULTIPLIERS |= {"logit_multiplier": 0.4, "logit_softcap": 2.0}
GPT_OSS = tiny(
    MoeConfig(num_experts=4, top_k=2, softmax_order="after", router_bias=True, expert_bias=True, capacity_factor=None),
    **{"num_layers": 3, "num_attention_heads": 4, "num_query_groups": 2, "sliding_window": 2, "attention_bias": True},
    **{"full_attention_every": 2, "attention_sinks": True, "attention_output_bias": True},
    **{"activation": "clamped_swiglu", "swiglu_alpha": 1.3, "swiglu_limit": 0.9},
)
MIXER = MoeConfig(num_experts=4, top_k=2, sparse_mixer_eps=0.4, capacity_factor=None)
LLAMA4 = tiny(
    MoeConfig(
        **{"num_experts": 4, "top_k": 2, "score_function": "sigmoid", "renormalize": False, "gate_on": "input"},
        **{"num_shared_experts": 1, "capacity_factor": 0.75},
    ),
    **{"num_layers": 3, "num_attention_heads": 4, "num_query_groups": 2, "attention_chunk_size": 2, "qk_norm": "l2"},
    **{"full_attention_every": 3, "no_rope_every": 3, "attention_temperature": 0.7, "attention_temperature_tokens": 2},
)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])


def tokens_of(batch: int, sequence: int, vocab: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, sequence), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("model", "document_mask"),
    [
        (tiny(DROPPING), False),
        (tiny(DROPPING, num_attention_heads=4, num_query_groups=2, tie_embeddings=True), True),
        (tiny(MoeConfig(num_experts=3, top_k=1, every=2), activation="relu"), False),
        (tiny(activation="swiglu", tie_embeddings=True), False),
        (GPT_OSS, False),
        (replace(GPT_OSS, moe=MoeConfig(), ffn_bias=True), True),
        (LLAMA4, False),
        (replace(LLAMA4, **MULTIPLIERS), True),
        (replace(LLAMA4, qk_norm=None, attention_temperature=None, no_rope_every=2, attention_multiplier=0.3), False),
        (tiny(MIXER, norm="layernorm", head_bias=True, logit_multiplier=0.7, tie_embeddings=True), False),
        (tiny(DROPPING, **MULTIPLIERS), False),
        (tiny(DROPPING, norm="layernorm"), False),
        (tiny(norm="layernorm", norm_zero_centered=True, qk_norm="head"), False),
        (tiny(norm_zero_centered=True, qk_norm="full", init_scale=1.0), False),
        (tiny(attention_chunk_size=2, full_attention_every=2, num_layers=3), True),
    ],
    ids=[
        "top-2 with drops",
        "grouped queries, tied, documents",
        "top-1",
        "dense, tied",
        "gpt-oss",
        "gpt-oss, dense",
        "llama 4",
        "llama 4, multipliers, documents",
        "no rotary embedding",
        "phi-3.5-moe",
        "multipliers",
        "layer norm",
        "layer norm, 1 + weight",
        "1 + weight",
        "chunks",
    ],
)
def test_equals_the_reference(model: ModelConfig, document_mask: bool, runtime: Runtime) -> None:
    """Loss of every token, logits, and the gradient of every weight, the auxiliary losses' share included."""
    stage = whole_model(model, runtime, sequence_length=6, document_mask=document_mask)
    tokens_BS, labels_BS = tokens_of(2, 6), tokens_of(2, 6, seed=1)
    for seed, parameter in enumerate(stage.parameters()):  # those that start as zeros, which would hide them
        if not parameter.any():
            parameter.data.copy_(random(*parameter.shape, seed=seed))
    weights = in_float64(stage)
    logits_BSV, sparse = reference.decoder(weights, model, tokens_BS, POSITIONS, document_mask)
    losses_BS = reference.cross_entropy(logits_BSV, labels_BS)
    coeffs = model.moe.aux_loss_coeff, model.moe.z_loss_coeff
    auxiliary = sum(coeffs[0] * did.aux_loss + coeffs[1] * did.z_loss for did in sparse.values())
    (losses_BS.mean() + 0.5 * auxiliary).backward()

    inputs = [t.to(runtime.device) for t in (tokens_BS, POSITIONS, labels_BS)]
    got_BS = stage(*inputs, BatchContext(loss_scale=0.5))
    got_BS.mean().backward()
    assert_close(got_BS, losses_BS)
    assert_gradients_close(stage, weights)
    assert_close(stage(*inputs[:2]), logits_BSV)


def test_the_reference_case_has_drops(runtime: Runtime) -> None:
    """Else the comparison above would not see the order in which tokens fill the experts."""
    model = tiny(DROPPING)
    _, sparse = reference.decoder(in_float64(whole_model(model, runtime)), model, tokens_of(2, 6), POSITIONS)
    kept = sparse[1].kept
    assert sum(not k for row in kept for k in row) >= 3 and any(all(row) for row in kept)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(changed=st.integers(0, 11), token=st.integers(0, 15), seed=st.integers(0, 99))
def test_a_later_token_never_changes_an_earlier_output(changed: int, token: int, seed: int, runtime: Runtime) -> None:
    """Dropless, as for generation: with a capacity, a later token's first choice may displace an earlier token's
    second. Nor does a token change another sequence of the batch."""
    model = tiny(MoeConfig(num_experts=4, top_k=2), num_attention_heads=4, num_query_groups=2)
    stage = whole_model(model, runtime, sequence_length=12)
    tokens_BS = tokens_of(2, 12, seed=seed)
    other_BS = tokens_BS.clone()
    other_BS[0, changed] = token if token != tokens_BS[0, changed] else (token + 1) % 16
    positions_BS = torch.arange(12).expand(2, -1).to(runtime.device)
    with torch.no_grad():
        dropless = {"batch_ctx": BatchContext(GENERATE)}
        before, after = (stage(t.to(runtime.device), positions_BS, **dropless) for t in (tokens_BS, other_BS))
    moved = (before - after).abs().amax(-1).cpu()
    assert moved[0, :changed].numel() == 0 or moved[0, :changed].max() < 1e-4 * before.abs().max()
    assert moved[1].max() < 1e-4 * before.abs().max()
    assert moved[0, changed] > 1e-2  # and it does change its own


def test_a_document_never_sees_another(runtime: Runtime) -> None:
    model = tiny(MoeConfig(num_experts=4, capacity_factor=None))
    stage = whole_model(model, runtime, sequence_length=6, document_mask=True)
    tokens_BS = tokens_of(1, 6)
    other_BS = tokens_BS.clone()
    other_BS[0, :3] = (tokens_BS[0, :3] + 1) % 16
    positions_BS = POSITIONS[:1].to(runtime.device)
    with torch.no_grad():
        before, after = (stage(t.to(runtime.device), positions_BS) for t in (tokens_BS, other_BS))
    moved = (before - after).abs().amax(-1)[0].cpu()
    assert moved[3:].max() < 1e-4 * before.abs().max() and moved[:3].min() > 1e-2


@pytest.mark.parametrize(
    ("every", "first_dense", "layers", "wanted"),
    [
        (1, 0, 3, [0, 1, 2]),
        (2, 0, 4, [1, 3]),
        (2, 0, 5, [1, 3]),
        (3, 0, 6, [2, 5]),
        (1, 2, 4, [2, 3]),
        (2, 1, 4, [1, 3]),
        (2, 2, 4, [3]),
    ],
)
def test_every_nth_layer_has_experts(
    every: int, first_dense: int, layers: int, wanted: list[int], runtime: Runtime
) -> None:
    model = tiny(MoeConfig(num_experts=2, every=every, first_dense_layers=first_dense), num_layers=layers)
    assert model.sparse_layers == wanted == list(whole_model(model, runtime).sparse())
    assert tiny(num_layers=layers).sparse_layers == []


def test_mode_reaches_every_sparse_layer(runtime: Runtime) -> None:
    """Nobody but a training pass may drop at the training capacity."""
    model = tiny(MoeConfig(num_experts=4, capacity_factor=0.25, eval_capacity_factor=None))
    stage = whole_model(model, runtime, sequence_length=6)
    dropless = whole_model(tiny(MoeConfig(num_experts=4, capacity_factor=None)), runtime, sequence_length=6)
    inputs = tokens_of(2, 6).to(runtime.device), POSITIONS.to(runtime.device)
    wanted = dropless(*inputs)
    assert not torch.equal(stage(*inputs), wanted)
    for mode in (EVALUATE, GENERATE):
        assert torch.equal(stage(*inputs, batch_ctx=BatchContext(mode)), wanted)


def test_only_the_router_stays_fp32_in_a_bf16_model(runtime: Runtime) -> None:
    model = tiny(MoeConfig(num_experts=4, every=2), hidden_size=16, ffn_hidden_size=16)
    stage = whole_model(model, runtime, dtype=torch.bfloat16, sequence_length=6)
    fp32 = [name for name, parameter in stage.named_parameters() if parameter.dtype == torch.float32]
    assert fp32 == ["layers.1.ffn.router.weight"]
    inputs = [t.to(runtime.device) for t in (tokens_of(2, 6), POSITIONS, tokens_of(2, 6, seed=1))]
    losses_BS = stage(*inputs)
    losses_BS.mean().backward()
    assert losses_BS.dtype == torch.float32
    assert stage.layers["1"].ffn.router.weight.grad.dtype == torch.float32


COSTED = {
    "dense": tiny(num_layers=3, activation="gelu"),
    "dense, gated, tied": tiny(tie_embeddings=True, activation="swiglu"),
    "sparse": tiny(MoeConfig(num_experts=4, top_k=2, capacity_factor=None)),
    "every second, of five": tiny(MoeConfig(num_experts=4, every=2, capacity_factor=None), num_layers=5),
    "grouped queries": tiny(
        MoeConfig(num_experts=2, capacity_factor=None), hidden_size=16, num_attention_heads=4, num_query_groups=1
    ),
    "norms of queries and keys": tiny(num_attention_heads=4, num_query_groups=2, head_dim=6, qk_norm="head"),
    "biases of attention": tiny(num_attention_heads=4, num_query_groups=2, head_dim=6, attention_bias=True),
    "norms over all heads": tiny(num_attention_heads=4, num_query_groups=2, qk_norm="full"),
    "gates of heads": tiny(num_attention_heads=4, num_query_groups=2, attention_output_gate="head"),
    "gates": tiny(num_attention_heads=4, head_dim=6, attention_output_gate="elementwise", attention_bias=True),
    "wide heads": tiny(num_attention_heads=4, num_query_groups=2, head_dim=6),
    "shared experts and biases": tiny(
        MoeConfig(num_experts=4, capacity_factor=None, num_shared_experts=2, shared_expert_gate=True, expert_bias=True)
    ),
    "first ones dense": tiny(MoeConfig(num_experts=4, capacity_factor=None, first_dense_layers=2), num_layers=5),
    "widths of their own": tiny(
        MoeConfig(num_experts=4, every=2, capacity_factor=None, ffn_hidden_size=6, expert_bias=True)
    ),
    "shared width": tiny(
        MoeConfig(
            num_experts=4, capacity_factor=None, ffn_hidden_size=6, num_shared_experts=2, shared_ffn_hidden_size=10
        )
    ),
    "biases": tiny(
        MoeConfig(num_experts=4, every=2, capacity_factor=None, num_shared_experts=1, router_bias=True),
        **{"ffn_bias": True, "attention_output_bias": True, "activation": "clamped_swiglu"},
    ),
    "layer norm": tiny(norm="layernorm", norm_zero_centered=True, qk_norm="head"),
    "multi-token prediction": tiny(num_layers=3, mtp_num_layers=2),
    "output bias": tiny(head_bias=True, tie_embeddings=True),
    "not gated": tiny(MoeConfig(num_experts=4, every=2, capacity_factor=None), activation="relu"),
}


FURTHER = replace(GPT_OSS, mtp_num_layers=2, norm="layernorm")
DROPLESS_LLAMA4 = replace(LLAMA4, moe=replace(LLAMA4.moe, capacity_factor=None))


@pytest.mark.parametrize(
    "model",
    [*COSTED.values(), GPT_OSS, FURTHER, DROPLESS_LLAMA4],
    ids=[*COSTED, "gpt-oss", "further", "llama 4"],
)
def test_parameters_are_as_many_as_planned(model: ModelConfig, runtime: Runtime) -> None:
    stage = whole_model(model, runtime)
    cost = model_cost(model, sequence_length=16)
    assert cost.total == sum(p.numel() for p in stage.parameters())
    # Active: all but the experts that a token does not visit.
    idle = (1 - model.moe.top_k / model.moe.num_experts) if model.moe.num_experts else 0.0
    experts = sum(p.numel() for layer in stage.sparse().values() for p in layer.experts.parameters())
    assert cost.active == cost.total - idle * experts


def counted_flops(stage: ModelChunk, model: ModelConfig, runtime: Runtime, batch: int, sequence: int) -> int:
    """Multiplications and additions of the matrix products of a forward and a backward pass."""
    tokens_BS = tokens_of(batch, sequence, model.vocab_size).to(runtime.device)
    positions_BS = torch.arange(sequence, device=runtime.device).expand(batch, -1)
    # The plain implementation of attention, whose products the counter sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage(tokens_BS, positions_BS, tokens_BS, BatchContext(labels_BS=tokens_BS)).mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", COSTED.values(), ids=COSTED)
def test_flops_are_as_many_as_planned(model: ModelConfig, runtime: Runtime) -> None:
    """Exactly, but for one thing: the plan also counts 6 per weight of the norms, which are not matrix products. Both
    count the whole square of the attention scores, of which a causal kernel may skip half; neither counts softmax,
    activations and other element-wise work."""
    batch, sequence = 2, 16
    counted = counted_flops(whole_model(model, runtime), model, runtime, batch, sequence)
    norms = (2 * model.num_layers + 1 + 5 * model.mtp_num_layers) * model.hidden_size
    planned = model_cost(model, sequence).flops_per_token - 6 * norms
    assert counted == planned * batch * sequence


@pytest.mark.parametrize(
    "limits",
    [
        {"sliding_window": 3},
        {"sliding_window": 99},
        {"attention_chunk_size": 4},
        {"sliding_window": 5, "full_attention_every": 2},
        {"attention_chunk_size": 4, "first_full_attention_layers": 1},
    ],
    ids=str,
)
def test_attention_costs_what_is_seen(limits: dict[str, int]) -> None:
    """Twice as many scores as there are pairs of a query and a key that it sees, the query's own counted as half."""
    model, sequence = tiny(num_layers=3, **limits), 16
    seen = 0.0
    for layer in range(3):
        local = layer in model.local_layers
        window, chunk = (
            size if local and size else sequence for size in (model.sliding_window, model.attention_chunk_size)
        )
        seen += sum(min(window, query % chunk + 1) - 0.5 for query in range(sequence))
    assert attention_span(model, sequence) == pytest.approx(2 * seen / sequence, rel=1e-9)


def test_a_cost_counts_what_is_computed() -> None:
    """Experts that choose take top_k * capacity_factor tokens on average; a full expert computes no more than fits."""

    def active(**moe: Any) -> int:
        return model_cost(tiny(MoeConfig(num_experts=4, **moe)), 16).active

    one, two = (active(top_k=k, capacity_factor=None) for k in (1, 2))
    assert active(top_k=2, capacity_factor=0.5) == active(top_k=1, capacity_factor=2.0) == one
    assert active(top_k=2, capacity_factor=0.5, load_balancing="expert_choice") == one
    assert active(top_k=1, capacity_factor=2.0, load_balancing="expert_choice") == two
    # With router and tables the same, what an expert costs is 6 times its weights.
    cost = {k: model_cost(tiny(MoeConfig(num_experts=4, top_k=k, capacity_factor=None)), 16) for k in (1, 2)}
    low = model_cost(tiny(MoeConfig(num_experts=4, top_k=2, capacity_factor=0.75)), 16)
    half_way = (cost[1].flops_per_token + cost[2].flops_per_token) / 2
    assert low.flops_per_token == pytest.approx(half_way, rel=1e-9)


@pytest.mark.parametrize("recompute", [[], ["norm", "activation", "moe"], ["full"]], ids=",".join)
def test_forward_hooks_fire_on_every_module(recompute: list[str], runtime: Runtime) -> None:
    """Once each in the forward pass, activation recompute or not."""
    moe = MoeConfig(num_experts=4, top_k=2, every=2, num_shared_experts=1, shared_expert_gate=True)
    decoder = whole_model(tiny(moe, qk_norm="head", recompute=recompute), runtime)
    with_forward = {n: m for n, m in decoder.named_modules() if type(m).forward is not nn.ModuleDict.forward}
    assert {type(m) for m in decoder.modules()} - {type(m) for m in with_forward.values()} == {nn.ModuleDict}
    fired: list[str] = []
    for name, module in with_forward.items():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    tokens_BS = tokens_of(2, 8).to(runtime.device)
    loss_BS = decoder(tokens_BS, torch.arange(8, device=runtime.device).expand(2, 8), tokens_BS)
    assert sorted(fired) == sorted(with_forward)
    loss_BS.sum().backward()
