"""DeepSeek-V2 (transformers/models/deepseek_v2: configuration_deepseek_v2.py, modeling_deepseek_v2.py), and what
DeepSeek-V3 has in common with it. Keys that only the files on the hub have are those of their own modeling code."""

from typing import Any

from conf.schema import ModelConfig
from models.hf.decoder import DENSE_FFN, DROPLESS, EMBEDDING_AND_HEAD, LAYER, NORMS, SPARSE_FFN, decoder_fields
from models.hf.family import Family, Field, HfConfig, WeightMapping


def _no_query_groups(value: int | None, config: HfConfig) -> None:
    if value not in (None, config["num_attention_heads"]):
        raise ValueError("only num_attention_heads: latent attention has no groups of query heads")


def latent_fields(*, q_lora_rank: int, **sizes: Any) -> tuple[Field, ...]:
    """As decoder_fields, with latent attention."""
    plain = [field for field in decoder_fields(**sizes) if field.key not in ("num_key_value_heads", "head_dim")]
    return (
        *plain,
        Field(
            "num_key_value_heads",
            "num_query_groups",
            sizes["groups"],
            nullable=True,
            from_hf=_no_query_groups,
            to_hf=lambda _, model: model.num_attention_heads,
        ),
        Field("q_lora_rank", "q_lora_rank", q_lora_rank, nullable=True),
        Field("kv_lora_rank", "kv_lora_rank", 512),
        Field("qk_nope_head_dim", "qk_nope_head_dim", 128),
        Field("qk_rope_head_dim", "qk_rope_head_dim", 64),
        Field("v_head_dim", "v_head_dim", 128),
    )


def _needed(value: int | None, _: HfConfig) -> int:
    if value is None:
        raise ValueError("a number is needed")
    return value


def expert_fields(*, width: int, experts: int, shared: int, top_k: int | None, scale: float) -> tuple[Field, ...]:
    return (
        Field("moe_intermediate_size", "moe.ffn_hidden_size", width, to_hf=lambda _, model: model.expert_width),
        Field("n_routed_experts", "moe.num_experts", experts, aliases=("num_local_experts", "num_experts")),
        Field("n_shared_experts", "moe.num_shared_experts", shared),
        Field("num_experts_per_tok", "moe.top_k", top_k, from_hf=_needed),
        Field("routed_scaling_factor", "moe.routed_scaling_factor", scale),
    )


_ATTENTION = {
    "q": "q_proj",
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}
SHARED_FFN = tuple(
    WeightMapping(f"{LAYER}ffn.shared.ffn.{part}.weight", (f"model.{LAYER}mlp.shared_experts.{part}_proj.weight",))
    for part in ("gate", "up", "down")
)
WEIGHTS = (
    *(*EMBEDDING_AND_HEAD, *NORMS, *DENSE_FFN, *SPARSE_FFN, *SHARED_FFN),
    *(
        WeightMapping(f"{LAYER}attention.{ours}.weight", (f"model.{LAYER}self_attn.{theirs}.weight",))
        for ours, theirs in _ATTENTION.items()
    ),
)
TRAINING = {**DROPLESS, "moe.load_balancing": "seq_aux_loss", "moe.aux_loss_coeff": 0.0}
"""As in Transformers without a balancing loss: DeepSeek-V2's config.json has aux_loss_alpha=0.001, DeepSeek-V3 was
trained with 0.0001 (arXiv:2412.19437, section 4.2)."""
DISABLED = {"attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1}
NEUTRAL = ("head_dim", "qk_head_dim", "pretraining_tp", "auto_map", "ep_size", "aux_loss_alpha", "seq_aux")
"""The first two follow from others."""


def _groups(value: int | None, config: HfConfig) -> int:
    """n_group or topk_group."""
    if config["topk_method"] == "greedy":
        return 1
    if not config["n_group"] or not config["topk_group"] or config["topk_group"] >= config["n_group"]:
        raise ValueError("topk_method=group_limited_greedy needs topk_group < n_group")
    assert value is not None
    return value


def refuse(model: ModelConfig) -> str | None:
    """Why a model does not fit either family."""
    if model.kv_lora_rank is None:
        return "model.kv_lora_rank=null, but the family has latent attention"
    return None if model.moe.num_shared_experts else "model.moe.num_shared_experts=0, but the family has at least one"


def _refuse(model: ModelConfig) -> str | None:
    if model.moe.num_expert_groups > 1 and model.moe.group_score != "max":
        return f"model.moe.group_score={model.moe.group_score}, but the family has only max"
    return refuse(model)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fields=(
        *latent_fields(
            vocab_size=102400, hidden_size=4096, layers=32, heads=32, groups=None, eps=1e-6, q_lora_rank=1536
        ),
        Field("intermediate_size", "ffn_hidden_size", 11008),
        *expert_fields(width=1407, experts=64, shared=2, top_k=None, scale=1.0),
        Field("first_k_dense_replace", "moe.first_dense_layers", 0, minimum=0),
        Field("topk_method", "moe.group_score", "greedy", values={"greedy": "top2", "group_limited_greedy": "max"}),
        *(
            Field(key, setting, from_hf=_groups, to_hf=lambda value, model: value if _is_limited(model) else None)
            for key, setting in (("n_group", "moe.num_expert_groups"), ("topk_group", "moe.top_k_groups"))
        ),
    ),
    weights=WEIGHTS,
    rope_theta=10000.0,
    disabled={**DISABLED, "mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"},
    settings={"rope_interleave": (True,), "moe.renormalize": (False,)},
    training=TRAINING,
    neutral_keys=NEUTRAL,
    refuse=_refuse,
)


def _is_limited(model: ModelConfig) -> bool:
    return model.moe.num_expert_groups > 1
