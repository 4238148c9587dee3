"""Qwen2, dense and sparse (transformers/models/qwen2 and qwen2_moe: configuration_*.py, modeling_*.py)."""

from models.hf.decoder import (
    ATTENTION,
    DENSE_FFN,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    LAYER,
    NORM_TOPK,
    NORMS,
    QKV_BIAS,
    SPARSE_FFN,
    SPARSE_LAYERS,
    balancing_field,
    decoder_fields,
)
from models.hf.family import Family, Field, HfConfig, WeightMapping
from models.hf.qwen3 import DISABLED, late_layers, window_fields

SHARED = f"model.{LAYER}mlp.shared_expert"
SHARED_FFN = (
    *(
        WeightMapping(f"{LAYER}ffn.shared.ffn.{part}.weight", (f"{SHARED}.{part}_proj.weight",))
        for part in ("gate", "up", "down")
    ),
    WeightMapping(f"{LAYER}ffn.shared.gate", (f"{SHARED}_gate.weight",)),
)


def _even_layers(config: HfConfig) -> list[bool]:
    """A window in layers 0, 2, 4, ... before max_window_layers."""
    count = config["max_window_layers"] if config["use_sliding_window"] else 0
    return [layer % 2 == 0 and layer < count for layer in range(config["num_hidden_layers"])]


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=4096, layers=32, heads=32, groups=32, eps=1e-6),
        *window_fields(late_layers),
        Field("intermediate_size", "ffn_hidden_size", 22016),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, QKV_BIAS, *DENSE_FFN),
    rope_theta=10000.0,
    disabled=DISABLED,
    settings={"attention_bias": (True,)},
    training={},
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=2048, layers=24, heads=16, groups=16, eps=1e-6),
        Field("qkv_bias", "attention_bias", True),
        *window_fields(_even_layers, unused=0),
        Field("intermediate_size", "ffn_hidden_size", 5632),
        Field("moe_intermediate_size", "moe.ffn_hidden_size", 1408, to_hf=lambda _, model: model.expert_width),
        Field(
            "shared_expert_intermediate_size",
            "moe.shared_ffn_hidden_size",
            5632,
            to_hf=lambda _, model: model.shared_width,
        ),
        *SPARSE_LAYERS,
        Field("num_experts", "moe.num_experts", 60, aliases=("num_local_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 4),
        NORM_TOPK,
        balancing_field(0.001),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, QKV_BIAS, *DENSE_FFN, *SPARSE_FFN, *SHARED_FFN),
    rope_theta=10000.0,
    disabled=DISABLED,
    settings={"moe.num_shared_experts": (1,), "moe.shared_expert_gate": (True,)},
    training=DROPLESS,
)
