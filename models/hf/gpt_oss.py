"""gpt-oss (transformers/models/gpt_oss/configuration_gpt_oss.py, modeling_gpt_oss.py), in unquantised weights.

Legend: E experts, D hidden, F expert hidden.
"""

from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    LAYER,
    NORMS,
    SLIDING,
    alternating,
    attention_bias_fields,
    balancing_field,
    decoder_fields,
    local_fields,
    unlike_softmax_after,
)
from models.hf.family import Family, Field, Layout, WeightMapping

INTERLEAVED = Layout(
    lambda parts, _: parts[0].unflatten(-1, (-1, 2)).transpose(-1, -2),
    lambda whole, _: [whole.transpose(-1, -2).flatten(-2)],
)
"""gate and up, alternating along the last dimension [..., 2 F] <-> [..., 2, F]."""
BLOCK = f"model.{LAYER}mlp."


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    fields=(
        *(
            field
            for field in decoder_fields(
                vocab_size=201088, hidden_size=2880, layers=36, heads=64, groups=8, eps=1e-5, head_dim=64
            )
            if field.key != "hidden_act"
        ),
        # Without effect in Transformers: the experts' activation is fixed.
        Field("hidden_act", "activation", "silu", values={"silu": "clamped_swiglu"}),
        Field("swiglu_alpha", "swiglu_alpha", 1.702),
        Field("swiglu_limit", "swiglu_limit", 7.0),
        *attention_bias_fields(True),
        *local_fields(SLIDING, "sliding_window", 128, alternating),
        Field("intermediate_size", "ffn_hidden_size", 2880, to_hf=lambda _, model: model.expert_width),
        Field("num_local_experts", "moe.num_experts", 128, aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 4, aliases=("experts_per_token",)),
        balancing_field(0.001),
    ),
    weights=(
        *EMBEDDING_AND_HEAD,
        *NORMS,
        *ATTENTION,
        *ATTENTION_BIASES,
        WeightMapping(LAYER + "attention.sinks", (f"model.{LAYER}self_attn.sinks",)),
        WeightMapping(LAYER + "ffn.router.weight", (BLOCK + "router.weight",)),
        WeightMapping(LAYER + "ffn.router.logit_bias", (BLOCK + "router.bias",)),
        WeightMapping(LAYER + "ffn.experts.w_in", (BLOCK + "experts.gate_up_proj",), INTERLEAVED),
        WeightMapping(LAYER + "ffn.experts.b_in", (BLOCK + "experts.gate_up_proj_bias",), INTERLEAVED),
        WeightMapping(LAYER + "ffn.experts.w_out", (BLOCK + "experts.down_proj",)),
        WeightMapping(LAYER + "ffn.experts.b_out", (BLOCK + "experts.down_proj_bias",)),
    ),
    rope_theta=150000.0,
    rope_parameters={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    disabled={"attention_dropout": 0.0},
    settings={
        "attention_sinks": (True,),
        "moe.expert_bias": (True,),
        "moe.router_bias": (True,),
        "moe.softmax_order": ("after", "before"),
        "moe.renormalize": (None, True),
    },
    training=DROPLESS,
    neutral_keys=("initial_context_length",),
    refuse=unlike_softmax_after,
)
