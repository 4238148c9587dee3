"""MiniMax-M2 (transformers/models/minimax_m2: configuration_minimax_m2.py, modeling_minimax_m2.py; the names of stored
tensors are those of conversion_mapping.py)."""

from conf.schema import ModelConfig
from models.hf.decoder import (
    ATTENTION,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    LAYER,
    NORMS,
    QK_NORMS,
    balancing_field,
    decoder_fields,
    sparse_ffn,
)
from models.hf.deepseek_v3 import balancing_bias, needs_bias
from models.hf.family import Family, Field


def _refuse(model: ModelConfig) -> str | None:
    if model.moe.top_k == 1 and model.moe.renormalize is None:
        return "model.moe.top_k=1: the family divides the selected scores by their sum, so that the gate would be 1"
    return needs_bias(model)


MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    fields=(
        *decoder_fields(vocab_size=200064, hidden_size=3072, layers=62, heads=48, groups=8, eps=1e-6, head_dim=128),
        Field("intermediate_size", "ffn_hidden_size", 1536),
        Field("num_local_experts", "moe.num_experts", 256, aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 8),
        balancing_field(0.001),
    ),
    weights=(
        *(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *QK_NORMS),
        *sparse_ffn("block_sparse_moe", "w1", "w3", "w2"),
        balancing_bias(f"model.{LAYER}block_sparse_moe"),
    ),
    rope_theta=5e6,
    disabled={
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
    },
    settings={
        "qk_norm": ("full",),
        "moe.score_function": ("sigmoid",),
        "moe.renormalize": (True, None),
    },
    training={**DROPLESS, "moe.bias_update_rate": 0.0},
    # Of layers for multi-token prediction, which Transformers ignores, and of kinds of attention of earlier models.
    neutral_keys=("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "attn_type_list", "mlp_intermediate_size"),
    partial_rotary=1.0,
    refuse=_refuse,
)
