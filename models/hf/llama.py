"""Llama and models with the same architecture (transformers/models/llama/configuration_llama.py, modeling_llama.py)."""

from models.hf.decoder import ATTENTION, DENSE_FFN, EMBEDDING_AND_HEAD, NORMS, decoder_fields
from models.hf.family import Family, Field

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32000, hidden_size=4096, layers=32, heads=32, groups=None, eps=1e-6),
        Field("intermediate_size", "ffn_hidden_size", 11008),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *DENSE_FFN),
    rope_theta=10000.0,
    disabled={"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    settings={},
    training={},
    neutral_keys=("pretraining_tp",),
    ignored_tensors=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
