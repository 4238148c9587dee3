"""Phi-3.5-MoE (transformers/models/phimoe/configuration_phimoe.py, modeling_phimoe.py; the names of stored tensors are
those of conversion_mapping.py)."""

from conf.schema import ModelConfig
from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    HEAD_BIAS,
    NORMS,
    attention_bias_fields,
    balancing_field,
    biases_differ,
    biases_of,
    decoder_fields,
    sparse_ffn,
)
from models.hf.family import Family, Field, HfConfig


def _two(value: int, _: HfConfig) -> int:
    if value != 2:
        raise ValueError("only 2: Transformers takes two experts, whatever it is")
    return value


def _near(value: float, _: HfConfig) -> float:
    if value <= 0:
        raise ValueError("only a positive number: every gate would be 1")
    return value


def _no_noise(value: float, _: HfConfig) -> float:
    if value:
        raise ValueError("only 0.0: it is noise of training alone, of the experts' inputs too. Set it to 0.0 to import")
    return value


def _refuse(model: ModelConfig) -> str | None:
    if reason := biases_differ(model):
        return reason
    if model.moe.sparse_mixer_eps is None:
        return "model.moe.sparse_mixer_eps=null, but the family has gates by SparseMixer"
    return None if model.moe.top_k == 2 else f"model.moe.top_k={model.moe.top_k}, but the family has only 2"


PHIMOE = Family(
    name="phimoe",
    architecture="PhimoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32064, hidden_size=4096, layers=32, heads=32, groups=8, eps=1e-5),
        *attention_bias_fields(False),
        Field("lm_head_bias", "head_bias", False),
        Field("sliding_window", "sliding_window"),
        Field("intermediate_size", "ffn_hidden_size", 6400),
        Field("num_local_experts", "moe.num_experts", 16, aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 2, from_hf=_two),
        Field("router_jitter_noise", "moe.sparse_mixer_eps", 0.01, from_hf=_near),
        Field("input_jitter_noise", "moe.jitter", 0.0, from_hf=_no_noise, to_hf=lambda *_: 0.0),
        balancing_field(0.001),
    ),
    weights=(
        *(
            *EMBEDDING_AND_HEAD,
            HEAD_BIAS,
            *NORMS,
            *biases_of((*NORMS, EMBEDDING_AND_HEAD[1])),
            *ATTENTION,
            *ATTENTION_BIASES,
        ),
        *sparse_ffn("block_sparse_moe", "w1", "w3", "w2"),
    ),
    rope_theta=1e6,
    rope_types=("default", "longrope"),
    disabled={"attention_dropout": 0.0},
    settings={"norm": ("layernorm",)},
    training=DROPLESS,
    neutral_keys=("original_max_position_embeddings",),
    refuse=_refuse,
)
"""Transformers samples experts and estimates gradients while it trains (SparseMixer); this model does neither."""
