"""ERNIE 4.5, text (transformers/models/ernie4_5_moe: configuration_ernie4_5_moe.py, modeling_ernie4_5_moe.py; the names
of stored tensors are those of conversion_mapping.py)."""

from conf.schema import ModelConfig
from models.hf.decoder import (
    ATTENTION,
    ATTENTION_BIASES,
    DENSE_FFN,
    EMBEDDING_AND_HEAD,
    HEAD_BIAS,
    LAYER,
    NORMS,
    SPARSE_FFN,
    biases_of,
    decoder_fields,
)
from models.hf.deepseek_v2 import SHARED_FFN, TRAINING
from models.hf.deepseek_v3 import needs_bias
from models.hf.family import Family, Field, HfConfig, Layout, WeightMapping

_ONE_ROW = Layout(lambda parts, _: parts[0].squeeze(0), lambda whole, _: [whole.unsqueeze(0)])
"""The correction bias [1, E] <-> [E]."""

_BIASES = ("attention_bias", "attention_output_bias", "ffn_bias", "head_bias")
"""The settings of use_bias. Routed experts have none."""


def _every(value: int | None, config: HfConfig) -> int:
    """moe_layer_interval, of a model whose last layers are not dense again."""
    end, last = config["moe_layer_end_index"], config["num_hidden_layers"] - 1
    if end not in (None, -1, last):
        raise ValueError(f"only with moe_layer_end_index -1 or {last}, the last layer, but it is {end}")
    return config["moe_layer_interval"] or 1


def _last_layer(_: int, model: ModelConfig) -> int:
    return model.num_layers - 1


def _refuse(model: ModelConfig) -> str | None:
    if model.moe.top_k == 1:
        return "model.moe.top_k=1: the family divides the selected scores by their sum, so that the gate would be 1"
    if len({getattr(model, setting) for setting in _BIASES}) > 1:
        return f"model.{', '.join(_BIASES)} differ, but the family has one setting for all"
    return needs_bias(model)


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    fields=(
        *(
            field
            for field in decoder_fields(vocab_size=103424, hidden_size=2560, layers=28, heads=20, groups=4, eps=1e-5)
            if field.key != "tie_word_embeddings"
        ),
        Field("tie_word_embeddings", "tie_embeddings", True),
        *(Field("use_bias", setting, False) for setting in _BIASES),
        Field("intermediate_size", "ffn_hidden_size", 12288),
        Field("moe_intermediate_size", "moe.ffn_hidden_size", 1536, to_hf=lambda _, model: model.expert_width),
        Field("moe_num_experts", "moe.num_experts", 64, aliases=("num_experts",)),
        Field("moe_k", "moe.top_k", 6, aliases=("num_experts_per_tok",)),
        Field("moe_num_shared_experts", "moe.num_shared_experts", 2, minimum=0),
        Field("moe_layer_start_index", "moe.first_dense_layers", 1, minimum=0),
        Field("moe_layer_interval", "moe.every", 1, from_hf=_every),
        Field("moe_layer_end_index", "moe.every", -1, minimum=-1, from_hf=_every, to_hf=_last_layer),
    ),
    weights=(
        *(*EMBEDDING_AND_HEAD, *NORMS, *ATTENTION, *DENSE_FFN, *SPARSE_FFN, *SHARED_FFN),
        *(*ATTENTION_BIASES, HEAD_BIAS, *biases_of(DENSE_FFN), *biases_of(SHARED_FFN)),
        WeightMapping(LAYER + "ffn.router.bias", (f"model.{LAYER}mlp.moe_statics.e_score_correction_bias",), _ONE_ROW),
    ),
    rope_theta=500000.0,
    disabled={"moe_norm_min": 1e-12},
    settings={"rope_interleave": (True,), "moe.renormalize": (True, None)},
    training={**TRAINING, "moe.bias_update_rate": 0.0},
    neutral_keys=("router_aux_loss_coef",),
    refuse=_refuse,
)
"""Transformers' balancing loss is not computed: the model was trained without one, by its bias."""
