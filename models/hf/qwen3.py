"""Qwen3, dense and sparse (transformers/models/qwen3 and qwen3_moe: configuration_*.py, modeling_*.py)."""

from collections.abc import Callable
from dataclasses import replace

from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DENSE_FFN,
    DROPLESS,
    EMBEDDING_AND_HEAD,
    NORM_TOPK,
    NORMS,
    QK_NORMS,
    SLIDING,
    SPARSE_FFN,
    SPARSE_LAYERS,
    attention_bias_fields,
    balancing_field,
    biases_differ,
    decoder_fields,
    local_fields,
)
from models.hf.family import Family, Field, HfConfig

DISABLED = {"attention_dropout": 0.0}


def _window(value: int | None, config: HfConfig) -> int | None:
    """sliding_window, which has no effect unless use_sliding_window is set."""
    return value or None if config["use_sliding_window"] else None


def window_fields(is_local: Callable[[HfConfig], list[bool]], unused: int | None = None) -> tuple[Field, ...]:
    """use_sliding_window, sliding_window, max_window_layers and layer_types.

    Args:
        is_local: config.json with defaults -> which layers have a window if it has no layer_types.
        unused: what the family's configuration class makes of sliding_window where it has no effect.
    """
    size, *kinds = local_fields(SLIDING, "sliding_window", 4096, is_local)

    def window(config: HfConfig) -> int | None:
        return size.from_hf(_window(config["sliding_window"], config), config)

    return (
        replace(
            size,
            minimum=0,
            from_hf=lambda _, config: window(config),
            to_hf=lambda value, _: unused if value is None else value,
        ),
        *kinds,
        Field(
            "use_sliding_window",
            "sliding_window",
            False,
            from_hf=lambda _, config: window(config),
            to_hf=lambda value, _: value is not None,
        ),
        Field(
            "max_window_layers",
            "first_full_attention_layers",
            28,
            minimum=0,
            from_hf=kinds[1].from_hf,  # layer_types says which layers they are, if it is there
            to_hf=lambda value, model: value if model.local_layers else 28,
        ),
    )


def late_layers(config: HfConfig) -> list[bool]:
    """A window from layer max_window_layers on."""
    windowed, first = _window(config["sliding_window"], config) is not None, config["max_window_layers"]
    return [windowed and layer >= first for layer in range(config["num_hidden_layers"])]


NORMED_HEADS = {"qk_norm": ("head",)}


def _every_window(_: object, config: HfConfig) -> int | None:
    return _window(config["sliding_window"], config)


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=4096, layers=32, heads=32, groups=32, eps=1e-6, head_dim=128),
        *attention_bias_fields(False),
        *window_fields(late_layers),
        Field("intermediate_size", "ffn_hidden_size", 22016),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *ATTENTION_BIASES, *QK_NORMS, *DENSE_FFN),
    rope_theta=10000.0,
    disabled=DISABLED,
    settings=NORMED_HEADS,
    training={},
    refuse=biases_differ,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *decoder_fields(vocab_size=151936, hidden_size=2048, layers=24, heads=32, groups=4, eps=1e-6),
        *attention_bias_fields(False),
        *(
            Field(key, "sliding_window", default, nullable=True, minimum=0, from_hf=_every_window, to_hf=to_hf)
            for key, default, to_hf in (
                ("sliding_window", 4096, lambda value, _: value),
                ("use_sliding_window", False, lambda value, _: value is not None),
            )
        ),
        Field("intermediate_size", "ffn_hidden_size", 6144),
        Field("moe_intermediate_size", "moe.ffn_hidden_size", 768, to_hf=lambda _, model: model.expert_width),
        *SPARSE_LAYERS,
        Field("num_experts", "moe.num_experts", 128, aliases=("num_local_experts",)),
        Field("num_experts_per_tok", "moe.top_k", 8),
        NORM_TOPK,
        balancing_field(0.001),
    ),
    weights=(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *ATTENTION_BIASES, *QK_NORMS, *DENSE_FFN, *SPARSE_FFN),
    rope_theta=10000.0,
    disabled=DISABLED,
    settings=NORMED_HEADS,
    training=DROPLESS,
    neutral_keys=("max_window_layers",),
    refuse=biases_differ,
)
"""Its window, if it has one, is that of every layer."""
