"""OLMoE (transformers/models/olmoe/configuration_olmoe.py, modeling_olmoe.py)."""

from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    NORM_TOPK,
    NORMS,
    QK_NORMS,
    SPARSE_FFN,
    attention_bias_fields,
    balancing_field,
    biases_differ,
    decoder_fields,
)
from models.hf.family import Family, Field

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=50304, hidden_size=2048, layers=16, heads=16, groups=None, eps=1e-5),
        Field("intermediate_size", "ffn_hidden_size", 2048),
        Field("num_experts", "moe.num_experts", 64, aliases=("num_local_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 8),
        *attention_bias_fields(False),
        Field("clip_qkv", "clip_qkv", fractional=True),
        NORM_TOPK,
        balancing_field(0.01),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *ATTENTION_BIASES, *QK_NORMS, *SPARSE_FFN),
    rope_theta=10000.0,
    disabled={"attention_dropout": 0.0},
    settings={"qk_norm": ("full",)},
    training=DROPLESS,
    refuse=biases_differ,
)
