"""Granite MoE (transformers/models/granitemoe/configuration_granitemoe.py, modeling_granitemoe.py; the names of stored
tensors are those of conversion_mapping.py).

Legend: E experts, D hidden, F expert hidden.
"""

from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    LAYER,
    NORMS,
    attention_bias_fields,
    balancing_field,
    decoder_fields,
    unlike_softmax_after,
)
from models.hf.family import Family, Field, Layout, WeightMapping

BLOCK = f"model.{LAYER}block_sparse_moe."
INPUT = Layout(
    lambda parts, _: parts[0].unflatten(1, (2, -1)).permute(0, 3, 1, 2),
    lambda whole, _: [whole.permute(0, 2, 3, 1).flatten(1, 2)],
)
"""gate above up [E, 2 F, D] <-> [E, D, 2, F]."""
OUTPUT = Layout(lambda parts, _: parts[0].transpose(1, 2), lambda whole, _: [whole.transpose(1, 2)])

GRANITEMOE = Family(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32000, hidden_size=4096, layers=32, heads=32, groups=None, eps=1e-6),
        *attention_bias_fields(False),
        Field("embedding_multiplier", "embedding_multiplier", 1.0),
        Field(
            "attention_multiplier",
            "attention_multiplier",
            1.0,
            to_hf=lambda value, model: model.head_width**-0.5 if value is None else value,
        ),
        Field("residual_multiplier", "residual_multiplier", 1.0),
        Field(
            "logits_scaling",
            "logit_multiplier",
            1.0,
            from_hf=lambda value, _: 1 / value,
            to_hf=lambda value, _: 1 / value,
        ),
        Field("intermediate_size", "ffn_hidden_size", 11008, to_hf=lambda _, model: model.expert_width),
        Field("num_local_experts", "moe.num_experts", 8, aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 2),
        balancing_field(0.001),
    ),
    weights=(
        *EMBEDDING_AND_HEAD,
        *NORMS,
        *ATTENTION,
        *ATTENTION_BIASES,
        WeightMapping(LAYER + "ffn.router.weight", (BLOCK + "router.layer.weight",)),
        WeightMapping(LAYER + "ffn.experts.w_in", (BLOCK + "input_linear.weight",), INPUT),
        WeightMapping(LAYER + "ffn.experts.w_out", (BLOCK + "output_linear.weight",), OUTPUT),
    ),
    rope_theta=10000.0,
    disabled={"attention_dropout": 0.0},
    settings={"moe.softmax_order": ("after", "before"), "moe.renormalize": (None, True)},
    training=DROPLESS,
    refuse=unlike_softmax_after,
)
