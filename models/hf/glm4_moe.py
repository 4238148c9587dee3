"""GLM-4.5 and its successors (transformers/models/glm4_moe: configuration_glm4_moe.py, modeling_glm4_moe.py)."""

from dataclasses import replace

from conf.schema import ModelConfig
from models.hf.decoder import (
    ATTENTION,
    DENSE_FFN,
    EMBEDDING_AND_HEAD,
    LAYER,
    MTP,
    MTP_COPIES,
    MTP_FIELD,
    MTP_TENSOR,
    NORM_TOPK,
    NORMS,
    QK_NORMS,
    QKV_BIAS,
    SPARSE_FFN,
    decoder_fields,
)
from models.hf.deepseek_v2 import SHARED_FFN, TRAINING, expert_fields
from models.hf.deepseek_v3 import balancing_bias, group_fields, needs_bias
from models.hf.family import Family, Field


def _refuse(model: ModelConfig) -> str | None:
    if model.qk_norm == "full":
        return "model.qk_norm=full, but the family normalises each head"
    if not model.moe.num_shared_experts:
        return "model.moe.num_shared_experts=0, but the family has at least one"
    return needs_bias(model)


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151552, hidden_size=4096, layers=46, heads=96, groups=8, eps=1e-5),
        Field("attention_bias", "attention_bias", False),
        Field(
            "use_qk_norm",
            "qk_norm",
            False,
            from_hf=lambda value, _: "head" if value else None,
            to_hf=lambda value, _: value == "head",
        ),
        Field("intermediate_size", "ffn_hidden_size", 10944),
        *expert_fields(width=1408, experts=128, shared=1, top_k=8, scale=1.0),
        Field("first_k_dense_replace", "moe.first_dense_layers", 1, minimum=0),
        *group_fields(1, 1),
        replace(NORM_TOPK, default=True),
        MTP_FIELD,
    ),
    weights=(
        *(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, QKV_BIAS, *QK_NORMS),
        *(*DENSE_FFN, *SPARSE_FFN, *SHARED_FFN, *MTP, balancing_bias(f"model.{LAYER}mlp.gate")),
    ),
    rope_theta=10000.0,
    disabled={"attention_dropout": 0.0},
    settings={"moe.score_function": ("sigmoid",)},
    training={**TRAINING, "moe.bias_update_rate": 0.0},
    partial_rotary=0.5,
    mtp_tensor=MTP_TENSOR,
    mtp_copies=MTP_COPIES,
    refuse=_refuse,
)
