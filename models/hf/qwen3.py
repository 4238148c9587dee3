"""Qwen3, dense and sparse (transformers/models/qwen3 and qwen3_moe: configuration_*.py, modeling_*.py)."""

from models.hf.decoder import (
    ATTENTION,
    DENSE_FFN,
    DROPLESS,
    NORM_TOPK,
    NORMS,
    OUTSIDE,
    QK_NORMS,
    SPARSE_FFN,
    WHICH_LAYERS,
    balancing_field,
    decoder_fields,
)
from models.hf.family import Family, Field

OFF = {"attention_dropout": 0.0, "use_sliding_window": False}
WINDOW = ("sliding_window", "max_window_layers")
"""Without use_sliding_window they say nothing."""
NORMED_HEADS = {"qk_norm": ("head",)}

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=4096, layers=32, heads=32, groups=32, eps=1e-6, head_dim=128),
        Field("intermediate_size", "ffn_hidden_size", 22016),
    ),
    weights=(*OUTSIDE, *NORMS, *ATTENTION, *QK_NORMS, *DENSE_FFN),
    rope_theta=10000.0,
    off={**OFF, "attention_bias": False},
    settings=NORMED_HEADS,
    training={},
    inert=WINDOW,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=2048, layers=24, heads=32, groups=4, eps=1e-6),
        Field("intermediate_size", "ffn_hidden_size", 6144),
        Field("moe_intermediate_size", "moe.ffn_hidden_size", 768, to_theirs=lambda _, model: model.expert_width),
        *WHICH_LAYERS,
        Field("num_experts", "moe.num_experts", 128, aliases=("num_local_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 8),
        NORM_TOPK,
        balancing_field(0.001),
    ),
    weights=(*OUTSIDE, *NORMS, *ATTENTION, *QK_NORMS, *DENSE_FFN, *SPARSE_FFN),
    rope_theta=10000.0,
    off={**OFF, "attention_bias": False},
    settings=NORMED_HEADS,
    training=DROPLESS,
    inert=WINDOW,
)
