"""DeepSeek-V3 (transformers/models/deepseek_v3: configuration_deepseek_v3.py, modeling_deepseek_v3.py), and models with
the same architecture: Moonlight under the same model_type, Kimi-K2 under another."""

from dataclasses import replace

from conf.schema import ModelConfig
from models.hf.decoder import LAYER, MTP, MTP_COPIES, MTP_FIELD, MTP_TENSOR, NORM_TOPK
from models.hf.deepseek_v2 import DISABLED, NEUTRAL, TRAINING, WEIGHTS, expert_fields, latent_fields, refuse
from models.hf.family import Family, Field, HfConfig, WeightMapping


def _groups(value: int | None, config: HfConfig) -> int:
    """n_group or topk_group; a single group if all of them are selected."""
    groups, chosen = config["n_group"] or 1, config["topk_group"] or 1
    return (value or 1) if chosen < groups else 1


def group_fields(groups: int, chosen: int) -> tuple[Field, ...]:
    """n_group and topk_group with their defaults."""
    return (
        Field("n_group", "moe.num_expert_groups", groups, nullable=True, from_hf=_groups),
        Field("topk_group", "moe.top_k_groups", chosen, nullable=True, from_hf=_groups),
    )


def balancing_bias(module: str) -> WeightMapping:
    """The correction bias, kept in this module of Transformers."""
    return WeightMapping(LAYER + "ffn.router.bias", (f"{module}.e_score_correction_bias",))


def needs_bias(model: ModelConfig) -> str | None:
    """Why a model does not belong to a family that has the balancing bias."""
    if model.moe.bias_update_rate is not None:
        return None
    return "model.moe.bias_update_rate=null: the family has a balancing bias, which 0 keeps as it is"


def _refuse(model: ModelConfig) -> str | None:
    return needs_bias(model) or refuse(model)


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    aliases=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    fields=(
        *latent_fields(
            vocab_size=129280, hidden_size=7168, layers=61, heads=128, groups=128, eps=1e-6, q_lora_rank=1536
        ),
        Field("intermediate_size", "ffn_hidden_size", 18432),
        *expert_fields(width=2048, experts=256, shared=1, top_k=8, scale=2.5),
        Field("first_k_dense_replace", "moe.first_dense_layers", 3, minimum=0),
        *group_fields(8, 4),
        replace(NORM_TOPK, default=True),
        Field("rope_interleave", "rope_interleave", True),
        MTP_FIELD,
    ),
    weights=(*WEIGHTS, *MTP, balancing_bias(f"model.{LAYER}mlp.gate")),
    rope_theta=10000.0,
    disabled={**DISABLED, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    settings={"moe.score_function": ("sigmoid",)},
    # The bias is kept as it is, as in the last phase of training (arXiv:2412.19437, section 4.2).
    training={**TRAINING, "moe.bias_update_rate": 0.0},
    neutral_keys=NEUTRAL,
    mtp_tensor=MTP_TENSOR,
    mtp_copies=MTP_COPIES,
    refuse=_refuse,
)
