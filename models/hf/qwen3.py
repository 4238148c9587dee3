"""Qwen3, dense and sparse (transformers/models/qwen3 and qwen3_moe: configuration_*.py, modeling_*.py)."""

from models.hf.decoder import (
    ATTENTION,
    DENSE_FFN,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    NORM_TOPK,
    NORMS,
    QK_NORMS,
    SPARSE_FFN,
    SPARSE_LAYERS,
    balancing_field,
    decoder_fields,
)
from models.hf.family import Family, Field

DISABLED = {"attention_dropout": 0.0, "use_sliding_window": False}
WINDOW = ("sliding_window", "max_window_layers")
"""Keys without effect unless use_sliding_window is set."""
NORMED_HEADS = {"qk_norm": ("head",)}

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=4096, layers=32, heads=32, groups=32, eps=1e-6, head_dim=128),
        Field("intermediate_size", "ffn_hidden_size", 22016),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *QK_NORMS, *DENSE_FFN),
    rope_theta=10000.0,
    disabled={**DISABLED, "attention_bias": False},
    settings=NORMED_HEADS,
    training={},
    neutral_keys=WINDOW,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=2048, layers=24, heads=32, groups=4, eps=1e-6),
        Field("intermediate_size", "ffn_hidden_size", 6144),
        Field("moe_intermediate_size", "moe.ffn_hidden_size", 768, to_hf=lambda _, model: model.expert_width),
        *SPARSE_LAYERS,
        Field("num_experts", "moe.num_experts", 128, aliases=("num_local_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 8),
        NORM_TOPK,
        balancing_field(0.001),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *QK_NORMS, *DENSE_FFN, *SPARSE_FFN),
    rope_theta=10000.0,
    disabled={**DISABLED, "attention_bias": False},
    settings=NORMED_HEADS,
    training=DROPLESS,
    neutral_keys=WINDOW,
)
