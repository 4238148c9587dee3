"""What the families share: Llama's decoder, whose names most of them kept (transformers/models/llama)."""

from models.hf.family import QKV, Field, Weights

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""hidden_act of gated feed-forward layers; the first of two names is written."""


def decoder_fields(*, vocab_size: int, hidden_size: int, layers: int, heads: int, groups: int | None, eps: float):
    """The fields of config.json with the defaults of the family's configuration class."""
    return (
        Field("vocab_size", "vocab_size", vocab_size),
        Field("hidden_size", "hidden_size", hidden_size),
        Field("num_hidden_layers", "num_layers", layers),
        Field("num_attention_heads", "num_attention_heads", heads),
        Field(
            "num_key_value_heads",
            "num_query_groups",
            groups,
            nullable=True,
            to_ours=lambda value, config: value or config["num_attention_heads"],
            to_theirs=lambda _, model: model.query_groups,
        ),
        Field("head_dim", "head_dim"),
        Field("hidden_act", "activation", "silu", values=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", eps),
        Field("tie_word_embeddings", "tie_embeddings", False),
    )


OUTSIDE = (
    Weights("embedding.weight", ("model.embed_tokens.weight",)),
    Weights("final_norm.weight", ("model.norm.weight",)),
    Weights("head.weight", ("lm_head.weight",)),
)
LAYER = "layers.{layer}."
ATTENTION = (
    Weights(
        LAYER + "attention.qkv.weight",
        tuple(f"model.{LAYER}self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
        QKV,
    ),
    Weights(LAYER + "attention.out.weight", (f"model.{LAYER}self_attn.o_proj.weight",)),
)
NORMS = (
    Weights(LAYER + "attention_norm.weight", (f"model.{LAYER}input_layernorm.weight",)),
    Weights(LAYER + "ffn_norm.weight", (f"model.{LAYER}post_attention_layernorm.weight",)),
)
DENSE_FFN = tuple(
    Weights(f"{LAYER}ffn.{part}.weight", (f"model.{LAYER}mlp.{part}_proj.weight",)) for part in ("gate", "up", "down")
)
