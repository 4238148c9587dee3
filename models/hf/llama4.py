"""Llama 4, text (transformers/models/llama4: Llama4TextConfig in configuration_llama4.py, modeling_llama4.py)."""

from conf.schema import ModelConfig
from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    LAYER,
    NORMS,
    attention_bias_fields,
    biases_differ,
    decoder_fields,
    local_fields,
)
from models.hf.family import Family, Field, HfConfig, Layout, WeightMapping

HALVES = Layout(
    lambda parts, _: parts[0].unflatten(-1, (2, -1)),
    lambda whole, _: [whole.flatten(-2)],
)
"""gate before up along the last dimension [..., 2 F] <-> [..., 2, F]."""
BLOCK = f"model.{LAYER}feed_forward."


def _has_rope(config: HfConfig) -> list[bool]:
    """no_rope_layers, which has 1 for a layer with rotary embedding, or what follows from no_rope_layer_interval."""
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    return [bool(kind) for kind in config["no_rope_layers"] or [(i + 1) % interval for i in range(layers)]]


def _no_rope_every(_: object, config: HfConfig) -> int | None:
    layers, wanted = config["num_hidden_layers"], _has_rope(config)
    for every in (None, *range(2, layers + 1)):
        if wanted[:layers] == [every is None or i % every != every - 1 for i in range(layers)]:
            return every
    raise ValueError("only every n-th layer without rotary embedding, n > 1, with an entry for each layer")


def _temperature(_: object, config: HfConfig) -> float | None:
    tuned = config["attn_temperature_tuning"] and _no_rope_every(None, config) is not None
    return config["attn_scale"] or None if tuned else None


def _sparse(_: object, config: HfConfig) -> tuple[int, int]:
    """(every, first_dense_layers) of moe_layers, or of interleave_moe_layer_step."""
    layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    if not config["moe_layers"]:
        return step, 0
    for first in range(layers):
        for every in (step, *range(1, layers + 1)):
            if config["moe_layers"] == [i for i in range(first, layers) if i % every == every - 1]:
                return every, first
    raise ValueError("only every n-th layer, and a number of first layers without experts")


def _refuse(model: ModelConfig) -> str | None:
    if model.qk_norm in (None, "l2"):
        return biases_differ(model)
    return f"model.qk_norm={model.qk_norm}, but the family normalises after the rotary embedding, without weights"


LLAMA4 = Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    fields=(
        *decoder_fields(vocab_size=202048, hidden_size=5120, layers=48, heads=40, groups=8, eps=1e-5, head_dim=128),
        *attention_bias_fields(False),
        Field(
            "use_qk_norm",
            "qk_norm",
            True,
            from_hf=lambda value, _: "l2" if value else None,
            to_hf=lambda value, _: value == "l2",
        ),
        Field(
            "no_rope_layers",
            "no_rope_every",
            [],
            from_hf=_no_rope_every,
            to_hf=lambda _, model: [int(model.has_rope(layer)) for layer in range(model.num_layers)],
        ),
        Field("no_rope_layer_interval", "no_rope_every", 4, from_hf=_no_rope_every, to_hf=lambda value, _: value or 4),
        Field(
            "attn_temperature_tuning",
            "attention_temperature",
            True,
            from_hf=_temperature,
            to_hf=lambda value, _: value is not None,
        ),
        Field("attn_scale", "attention_temperature", 0.1, from_hf=_temperature, to_hf=lambda value, _: value or 0.1),
        Field(
            "floor_scale",
            "attention_temperature_tokens",
            8192,
            from_hf=lambda value, config: value if _temperature(None, config) else 8192,
        ),
        *local_fields("chunked_attention", "attention_chunk_size", 8192, _has_rope),
        Field("intermediate_size_mlp", "ffn_hidden_size", 16384),
        Field("intermediate_size", "moe.ffn_hidden_size", 8192, to_hf=lambda _, model: model.expert_width),
        Field("interleave_moe_layer_step", "moe.every", 1, from_hf=lambda v, config: _sparse(v, config)[0]),
        *(
            Field(
                "moe_layers",
                setting,
                [],
                from_hf=lambda value, config, index=index: _sparse(value, config)[index],
                to_hf=lambda _, model: model.sparse_layers,
            )
            for index, setting in enumerate(("moe.every", "moe.first_dense_layers"))
        ),
        Field("num_local_experts", "moe.num_experts", 16, aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 1),
    ),
    weights=(
        *(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *ATTENTION_BIASES),
        *(
            WeightMapping(f"{LAYER}ffn.{ours}{part}.weight", (f"{BLOCK}{theirs}{part}_proj.weight",))
            for ours, theirs in (("", ""), ("shared.ffn.", "shared_expert."))
            for part in ("gate", "up", "down")
        ),
        WeightMapping(LAYER + "ffn.router.weight", (BLOCK + "router.weight",)),
        WeightMapping(LAYER + "ffn.experts.w_in", (BLOCK + "experts.gate_up_proj",), HALVES),
        WeightMapping(LAYER + "ffn.experts.w_out", (BLOCK + "experts.down_proj",)),
    ),
    rope_theta=500000.0,
    disabled={"attention_dropout": 0.0, "router_jitter_noise": 0.0},
    settings={
        **{"rope_interleave": (True,), "moe.num_shared_experts": (1,), "moe.score_function": ("sigmoid",)},
        **{"moe.renormalize": (False,), "moe.gate_on": ("input",)},
    },
    training={**DROPLESS, "moe.aux_loss_coeff": 0.0},  # of which Transformers has none
    neutral_keys=("router_aux_loss_coef", "cache_implementation"),
    refuse=_refuse,
)
