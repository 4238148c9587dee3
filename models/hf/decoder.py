"""The parts that families share: the fields and tensors of Llama's decoder (transformers/models/llama)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from conf.schema import ModelConfig
from models.hf.family import GATE_AND_UP, QKV, TRANSPOSED, Field, HfConfig, WeightMapping

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""hidden_act -> activation of gated feed-forward layers; an export writes the first matching name."""


def decoder_fields(
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    groups: int | None,
    eps: float,
    head_dim: int | None = None,
) -> tuple[Field, ...]:
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
            from_hf=lambda value, config: value or config["num_attention_heads"],
            to_hf=lambda _, model: model.query_groups,
        ),
        # Written explicitly if the default of Transformers is a number.
        Field("head_dim", "head_dim", head_dim, to_hf=lambda value, model: value or (head_dim and model.head_width)),
        Field("hidden_act", "activation", "silu", values=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", eps),
        Field("tie_word_embeddings", "tie_embeddings", False),
    )


SLIDING, FULL = "sliding_attention", "full_attention"


def local_fields(
    kind: str, key: str, size: int | None, is_local: Callable[[HfConfig], list[bool]]
) -> tuple[Field, ...]:
    """The size of windows or chunks, and layer_types.

    Args:
        kind: of the layers with local attention, in layer_types.
        key: of their size in config.json, and the setting.
        size: the default of `key`.
        is_local: config.json with defaults -> which layers are of this kind if it has no layer_types.
    """

    def local(config: HfConfig) -> list[bool]:
        layers = config["num_hidden_layers"]
        kinds = config["layer_types"] or [kind if is_one else FULL for is_one in is_local(config)]
        if others := sorted({str(other) for other in kinds} - {kind, FULL}):
            raise ValueError(f"has {', '.join(others)}: only {kind}, {FULL}")
        if len(kinds) != layers:
            raise ValueError(f"must have an entry for each of the {layers} layers")
        return [other == kind for other in kinds]

    def width(value: int | None, config: HfConfig) -> int | None:
        if value is None and any(local(config)):
            raise ValueError(f"must be a positive integer, since layer_types has {kind}")
        return value if any(local(config)) else None

    def pattern(value: Any, config: HfConfig) -> tuple[int | None, int]:
        """(full_attention_every, first_full_attention_layers)."""
        wanted = local(config)
        if not any(wanted):
            return None, 0
        for first in range(len(wanted)):
            for every in (None, *range(2, len(wanted) + 1)):
                if wanted == [i >= first and (every is None or i % every != every - 1) for i in range(len(wanted))]:
                    return every, first
        raise ValueError("only every n-th layer, and a number of first layers, with full attention")

    def kinds(_: object, model: ModelConfig) -> list[str]:
        return [kind if layer in model.local_layers else FULL for layer in range(model.num_layers)]

    return (
        Field(key, key, size, nullable=True, from_hf=width, to_hf=lambda value, _: value or size),
        Field("layer_types", "full_attention_every", [], from_hf=lambda v, c: pattern(v, c)[0], to_hf=kinds),
        Field("layer_types", "first_full_attention_layers", [], from_hf=lambda v, c: pattern(v, c)[1], to_hf=kinds),
    )


def alternating(config: HfConfig) -> list[bool]:
    """Local attention in layers 0, 2, 4, ..."""
    return [layer % 2 == 0 for layer in range(config["num_hidden_layers"])]


def _count_sparse(config: HfConfig) -> int:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return sum((i + 1) % step == 0 and i not in dense for i in range(config["num_hidden_layers"]))


def balancing_field(default: float) -> Field:
    """The coefficient of the load-balancing loss. Transformers counts a token top_k times and pools the sparse layers;
    here a token counts once and layers are summed."""
    return Field(
        "router_aux_loss_coef",
        "moe.aux_loss_coeff",
        default,
        from_hf=lambda value, config: value * config["num_experts_per_tok"] / max(1, _count_sparse(config)),
        to_hf=lambda value, model: value * len(model.sparse_layers) / model.moe.top_k,
    )


def _first_layers(value: list[int] | None, config: HfConfig) -> int:
    """mlp_only_layers as the number of dense layers at the beginning."""
    count = len(value or [])
    if (value or []) != list(range(count)):
        raise ValueError("only the first layers, [0, 1, ...]")
    return count


SPARSE_LAYERS = (
    Field("decoder_sparse_step", "moe.every", 1),
    Field(
        "mlp_only_layers",
        "moe.first_dense_layers",
        [],
        from_hf=_first_layers,
        to_hf=lambda value, _: list(range(value)),
    ),
)


def attention_bias_fields(default: bool) -> tuple[Field, ...]:
    """attention_bias, of the projections and of the output."""
    return tuple(Field("attention_bias", setting, default) for setting in ("attention_bias", "attention_output_bias"))


def biases_differ(model: ModelConfig) -> str | None:
    """Family.refuse of families with `attention_bias_fields`."""
    if model.attention_bias == model.attention_output_bias:
        return None
    return "model.attention_bias and attention_output_bias differ, but the family has one setting for both"


def unlike_softmax_after(model: ModelConfig) -> str | None:
    """The same with a softmax over the selected logits."""
    one = "model.moe.top_k=1: the softmax over one selected logit is 1"
    return biases_differ(model) or (one if model.moe.top_k == 1 else None)


NORM_TOPK = Field(
    "norm_topk_prob",
    "moe.renormalize",
    False,
    to_hf=lambda value, model: model.moe.top_k > 1 if value is None else value,
)
DROPLESS = {"moe.capacity_factor": None, "moe.eval_capacity_factor": None, "moe.z_loss_coeff": 0.0}
"""Settings of an imported sparse model."""

EMBEDDING_AND_HEAD = (
    WeightMapping("embedding.weight", ("model.embed_tokens.weight",)),
    WeightMapping("final_norm.weight", ("model.norm.weight",)),
    WeightMapping("head.weight", ("lm_head.weight",)),
)
LAYER = "layers.{layer}."
ATTENTION = (
    WeightMapping(
        LAYER + "attention.qkv.weight",
        tuple(f"model.{LAYER}self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
        QKV,
    ),
    WeightMapping(LAYER + "attention.out.weight", (f"model.{LAYER}self_attn.o_proj.weight",)),
)
QKV_BIAS = WeightMapping(
    LAYER + "attention.qkv.bias", tuple(f"model.{LAYER}self_attn.{part}_proj.bias" for part in ("q", "k", "v")), QKV
)
ATTENTION_BIASES = (
    QKV_BIAS,
    WeightMapping(LAYER + "attention.out.bias", (f"model.{LAYER}self_attn.o_proj.bias",)),
)
NORMS = (
    WeightMapping(LAYER + "attention_norm.weight", (f"model.{LAYER}input_layernorm.weight",)),
    WeightMapping(LAYER + "ffn_norm.weight", (f"model.{LAYER}post_attention_layernorm.weight",)),
)
HEAD_BIAS = WeightMapping("head.bias", ("lm_head.bias",))
DENSE_FFN = tuple(
    WeightMapping(f"{LAYER}ffn.{part}.weight", (f"model.{LAYER}mlp.{part}_proj.weight",))
    for part in ("gate", "up", "down")
)


def biases_of(weights: Sequence[WeightMapping]) -> tuple[WeightMapping, ...]:
    """The biases of linear layers or norms, by the mappings of their weights."""

    def bias(name: str) -> str:
        return name.removesuffix("weight") + "bias"

    return tuple(replace(rule, parameter=bias(rule.parameter), tensors=(bias(rule.tensors[0]),)) for rule in weights)


QK_NORMS = tuple(
    WeightMapping(f"{LAYER}attention.{part}_layernorm.weight", (f"model.{LAYER}self_attn.{part}_norm.weight",))
    for part in ("q", "k")
)

MTP_TENSOR = "eh_proj.weight"
MTP = (
    *(
        WeightMapping(f"{LAYER}{part}.weight", (f"model.{LAYER}{part}.weight",))
        for part in ("enorm", "hnorm", "eh_proj")
    ),
    WeightMapping(LAYER + "final_norm.weight", (f"model.{LAYER}shared_head.norm.weight",)),
)
"""A layer for multi-token prediction, besides its block."""
MTP_COPIES = {"embed_tokens.weight": "embedding.weight", "shared_head.head.weight": "head.weight"}
MTP_FIELD = Field("num_nextn_predict_layers", "mtp_num_layers", 1, aliases=("num_mtp_layers",), minimum=0)


def sparse_ffn(block: str, gate: str, up: str, down: str) -> tuple[WeightMapping, ...]:
    """The router and the experts, with a family's names of the block and of the projections."""
    expert = f"model.{LAYER}{block}.experts.{{expert}}."
    return (
        WeightMapping(LAYER + "ffn.router.weight", (f"model.{LAYER}{block}.gate.weight",)),
        WeightMapping(LAYER + "ffn.experts.w_in", (f"{expert}{gate}.weight", f"{expert}{up}.weight"), GATE_AND_UP),
        WeightMapping(LAYER + "ffn.experts.w_out", (f"{expert}{down}.weight",), TRANSPOSED),
    )


SPARSE_FFN = sparse_ffn("mlp", "gate_proj", "up_proj", "down_proj")
