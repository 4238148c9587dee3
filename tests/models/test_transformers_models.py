"""Whole decoders against those of Hugging Face Transformers with the same weights: logits, loss and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from conf.schema import ModelConfig, MoeConfig
from models.decoder import ModelChunk
from parallel.batch_context import BatchContext
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random, tiny, whole_model

EXPERTS, TOKENS = 6, (2, 12)
PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.router": "mlp.gate",
    "ffn.shared.ffn.gate": "mlp.shared_expert.gate_proj",
    "ffn.shared.ffn.up": "mlp.shared_expert.up_proj",
    "ffn.shared.ffn.down": "mlp.shared_expert.down_proj",
}
"""Of a layer, our names and theirs."""


def as_transformers(ours: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under Transformers' names and in its shapes."""
    theirs = {}
    for name, t in ours.items():
        where, kind = name.rsplit(".", 1)
        if not where.startswith("layers."):
            outside = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
            theirs[f"{outside[where]}.{kind}"] = t
            continue
        _, index, part = where.split(".", 2)
        layer = f"model.layers.{index}."
        if part == "attention.qkv":
            queries = model.num_attention_heads // model.query_groups
            rows = t.unflatten(0, (model.query_groups, queries + 2, model.head_width))
            for what, mine in (("q", rows[:, :queries]), ("k", rows[:, queries]), ("v", rows[:, queries + 1])):
                theirs[f"{layer}self_attn.{what}_proj.{kind}"] = mine.reshape(-1, *t.shape[1:])
        elif part == "ffn.experts":
            fused = t.permute(0, 2, 3, 1).flatten(1, 2) if kind == "w_in" else t.transpose(1, 2)
            theirs[layer + "mlp.experts." + {"w_in": "gate_up_proj", "w_out": "down_proj"}[kind]] = fused
        elif part == "ffn.shared":
            theirs[layer + "mlp.shared_expert_gate.weight"] = t
        else:
            theirs[f"{layer}{PARTS[part]}.{kind}"] = t
    return theirs


def their_model(family: str, model: ModelConfig, settings: dict[str, Any]) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attn_implementation="eager",
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        **settings,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def dense(**settings: Any) -> ModelConfig:
    sizes = {"hidden_size": 16, "ffn_hidden_size": 20, "num_attention_heads": 4, "num_query_groups": 2}
    return tiny(**{**sizes, "activation": "swiglu", "init_scale": 2.0, "rope_theta": 100.0, **settings})


def sparse(moe: dict[str, Any], **settings: Any) -> ModelConfig:
    experts = {"num_experts": EXPERTS, "top_k": 2, "capacity_factor": None, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}
    return replace(dense(**settings), moe=MoeConfig(**experts | moe))


FAMILIES: dict[str, tuple[str, ModelConfig, dict[str, Any]]] = {
    "llama, head_dim": ("Llama", dense(head_dim=6), {"head_dim": 6}),
    "qwen2": ("Qwen2", dense(attention_bias=True), {}),
    "qwen3": ("Qwen3", dense(head_dim=6, qk_norm="head"), {"head_dim": 6}),
    "qwen2_moe": (
        "Qwen2Moe",
        sparse(
            {"ffn_hidden_size": 8, "shared_ffn_hidden_size": 10, "num_shared_experts": 1, "shared_expert_gate": True}
            | {"every": 2},
            attention_bias=True,
        ),
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 8}
        | {"shared_expert_intermediate_size": 10, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        sparse({"ffn_hidden_size": 8, "first_dense_layers": 1}, num_layers=3, head_dim=6, qk_norm="head"),
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 8}
        | {"head_dim": 6, "mlp_only_layers": [0]},
    ),
    "olmoe": (
        "Olmoe",
        sparse({"renormalize": False}, qk_norm="full", clip_qkv=1.0),
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": 1.0},
    ),
}
"""family of Transformers, our model, its settings"""


def trained_weights(stage: ModelChunk) -> None:
    """Norms begin as ones and biases as zeros, which would hide them."""
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in stage.parameters() if p.dim() == 1):
            parameter.copy_(1 + 0.5 * random(*parameter.shape, seed=seed))


@pytest.mark.parametrize("case", FAMILIES)
def test_equals_transformers(case: str, runtime: Runtime) -> None:
    family, model, settings = FAMILIES[case]
    stage = whole_model(model, runtime, sequence_length=TOKENS[1])
    trained_weights(stage)
    theirs = their_model(family, model, settings).to(runtime.device)
    theirs.load_state_dict(as_transformers(dict(stage.named_parameters()), model))

    tokens_BS = torch.randint(0, model.vocab_size, TOKENS, generator=torch.Generator().manual_seed(3))
    tokens_BS, positions_BS = tokens_BS.to(runtime.device), torch.arange(TOKENS[1]).expand(TOKENS).to(runtime.device)
    wanted = theirs(input_ids=tokens_BS, labels=tokens_BS)
    wanted.loss.backward()
    loss = stage(tokens_BS, positions_BS, tokens_BS.roll(-1, 1), BatchContext())[:, :-1].mean()
    loss.backward()

    assert_close(stage(tokens_BS, positions_BS), wanted.logits.detach().cpu().double())
    assert loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    gradients = as_transformers({name: p.grad for name, p in stage.named_parameters()}, model)
    for name, parameter in theirs.named_parameters():
        try:
            assert_close(gradients[name], parameter.grad.cpu().double())
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
