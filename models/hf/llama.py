"""Llama and what is built like it (transformers/models/llama/configuration_llama.py, modeling_llama.py)."""

from models.hf.decoder import ATTENTION, DENSE_FFN, NORMS, OUTSIDE, decoder_fields
from models.hf.family import Family, Field

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32000, hidden_size=4096, layers=32, heads=32, groups=None, eps=1e-6),
        Field("intermediate_size", "ffn_hidden_size", 11008),
    ),
    weights=(*OUTSIDE, *NORMS, *ATTENTION, *DENSE_FFN),
    rope_theta=10000.0,
    off={"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    settings={},
    training={},
    inert=("pretraining_tp",),
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
