"""Mixtral (transformers/models/mixtral/configuration_mixtral.py, modeling_mixtral.py; the names of stored tensors are
those of conversion_mapping.py)."""

from conf.schema import ModelConfig
from models.hf.decoder import (
    ATTENTION,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    NORMS,
    balancing_field,
    decoder_fields,
    sparse_ffn,
)
from models.hf.family import Family, Field


def _one_expert(model: ModelConfig) -> str | None:
    if model.moe.top_k > 1:
        return None
    return "model.moe.top_k=1: Mixtral divides the selected probabilities by their sum, so that the gate would be 1"


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32000, hidden_size=4096, layers=32, heads=32, groups=8, eps=1e-5),
        Field("intermediate_size", "ffn_hidden_size", 14336),
        Field("num_local_experts", "moe.num_experts", 8, aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 2),
        Field("sliding_window", "sliding_window"),
        balancing_field(0.001),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *sparse_ffn("block_sparse_moe", "w1", "w3", "w2")),
    rope_theta=1e6,
    disabled={"attention_dropout": 0.0, "router_jitter_noise": 0.0},
    settings={"moe.softmax_order": ("after", "before"), "moe.renormalize": (None, True)},
    training=DROPLESS,
    refuse=_one_expert,
)
