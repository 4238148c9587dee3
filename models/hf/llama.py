"""Llama and models with the same architecture (transformers/models/llama/configuration_llama.py, modeling_llama.py)."""

from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DENSE_FFN,
    EMBEDDING_AND_HEAD,
    NORMS,
    attention_bias_fields,
    biases_differ,
    biases_of,
    decoder_fields,
)
from models.hf.family import Family, Field

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32000, hidden_size=4096, layers=32, heads=32, groups=None, eps=1e-6),
        *attention_bias_fields(False),
        Field("mlp_bias", "ffn_bias", False),
        Field("intermediate_size", "ffn_hidden_size", 11008),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *ATTENTION_BIASES, *DENSE_FFN, *biases_of(DENSE_FFN)),
    rope_theta=10000.0,
    disabled={"attention_dropout": 0.0},
    settings={},
    training={},
    neutral_keys=("pretraining_tp",),
    refuse=biases_differ,
    ignored_tensors=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
