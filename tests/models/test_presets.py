"""The presets of published models: the settings and sizes that were published, and a model that can be built."""

import dataclasses
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from conf.schema import ModelConfig
from models.hf.configuration import model_of
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import ROOT
from training.flops import model_cost
from training.model_shapes import logical_shapes

PRESETS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
MIXTRAL = {"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
QWEN3 = {"norm_topk_prob": True, "head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
PUBLISHED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mixtral_8x7b": ("46.7", "12.9", "Mixtral", MIXTRAL),
    "mixtral_8x22b": (
        "141",
        "39",
        "Mixtral",
        MIXTRAL | {"hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48, "intermediate_size": 16384},
    ),
    "olmoe_1b_7b": ("6.9", "1.3", "Olmoe", {"intermediate_size": 1024}),
    "qwen3_30b_a3b": ("30.5", "3.3", "Qwen3Moe", QWEN3 | {"num_hidden_layers": 48}),
    "qwen3_235b_a22b": (
        "235",
        "22",
        "Qwen3Moe",
        QWEN3
        | {
            "num_hidden_layers": 94,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
        },
    ),
    "gpt_oss_20b": ("20.91", "3.61", "GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt_oss_120b": ("116.83", "5.13", "GptOss", {}),
    "deepseek_v2_lite": (
        "15.7",
        "2.4",
        "DeepseekV2",
        {
            **{"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "q_lora_rank": None},
            **{
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "num_experts_per_tok": 6,
                "first_k_dense_replace": 1,
            },
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": ("671", "37", "DeepseekV3", {"rope_parameters": YARN}),
    "kimi_k2": (
        "1.0E3",
        "32",
        "DeepseekV3",
        {
            **{"vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
            "rope_parameters": YARN | {"rope_theta": 5e4, "factor": 32.0, "beta_fast": 1.0},
        },
    ),
    "moonlight_16b_a3b": (
        "16",
        "3",
        "DeepseekV3",
        {
            **{"vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16},
            **{"num_key_value_heads": 16, "intermediate_size": 11264, "moe_intermediate_size": 1408},
            **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
            **{"q_lora_rank": None, "first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        },
    ),
    "glm4_5_air": (
        "106",
        "12",
        "Glm4Moe",
        {
            **{"attention_bias": True, "head_dim": 128},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
    ),
}
"""Billions of parameters, of active ones, both with the digits that were printed; and the published config.json, where
it differs from the defaults of Transformers' configuration class."""


LOOKUP_IS_NOT_ACTIVE = ("gpt_oss_20b", "gpt_oss_120b", "deepseek_v2_lite", "glm4_5_air")
"""Whose publication counts the output layer as active but not the embedding."""


def preset(name: str) -> ModelConfig:
    given = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    given = given.get("model", given)  # some also say how the model is trained
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), given))
    assert isinstance(model, ModelConfig)
    return model


def what_weights_mean(settings: Any) -> dict[str, Any]:
    """The settings that decide what a trained weight means: without how it is trained and computed with."""
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if "resumable" not in f.metadata}
    return {k: what_weights_mean(v) if dataclasses.is_dataclass(v) else v for k, v in kept.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name: str) -> None:
    """By Transformers: the same settings as an import of the published config.json, and as many parameters."""
    transformers = pytest.importorskip("transformers")
    *_, kind, given = PUBLISHED[name]
    config = getattr(transformers, f"{kind}Config")(**given)
    ours = preset(name)
    _, theirs = model_of(config.to_dict(), Path("config.json"))
    # Widths that nothing of the model has, and defaults written out, are no difference.
    spelt_out = [
        dataclasses.replace(
            model,
            name="",
            mtp_num_layers=0,  # Transformers has the number, but not the layers
            head_dim=model.head_width,
            num_query_groups=model.query_groups,
            ffn_hidden_size=model.ffn_hidden_size,
            moe=dataclasses.replace(
                model.moe,
                ffn_hidden_size=model.expert_width,
                renormalize=None if model.moe.softmax_order == "after" else model.moe.renormalize,
            ),
        )
        for model in (ours, theirs)
    ]
    assert what_weights_mean(spelt_out[0]) == what_weights_mean(spelt_out[1])
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    assert model_cost(ours, 4096).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_sizes_are_the_published_ones(name: str) -> None:
    model = preset(name)
    cost = model_cost(model, 4096)
    lookup = model.vocab_size * model.hidden_size if name in LOOKUP_IS_NOT_ACTIVE else 0
    for counted, printed in zip((cost.total, cost.active - lookup), PUBLISHED[name], strict=False):
        # Some publications round, others cut: within one of the last printed digit.
        last_digit = 10.0 ** int(Decimal(printed).as_tuple().exponent)
        assert abs(counted / 1e9 - float(printed)) < last_digit, (counted, printed)


def test_the_layer_for_multi_token_prediction_has_the_published_size() -> None:
    """README_WEIGHTS.md of DeepSeek-V3: 11.5 B parameters besides the shared embedding and head, 1.5 B activated with
    the head. Both are without the projection of the two hidden states, 0.1 B."""
    model = preset("deepseek_v3")
    plain, further = (model_cost(dataclasses.replace(model, mtp_num_layers=n), 4096) for n in (0, 1))
    head, projection = model.vocab_size * model.hidden_size, 2 * model.hidden_size**2
    assert round((further.total - plain.total - projection) / 1e9, 1) == 11.5
    assert round((further.active - plain.active - projection + head) / 1e9, 1) == 1.5


def shapes_of(world: World, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """In a process of its own: here ranks may have met (rank function for the pool)."""
    return logical_shapes(model, states=False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name: str, ranks: RankPool) -> None:
    """On meta tensors; with as many parameters as the table of a run says."""
    model = preset(name)
    assert model.name == name
    (shapes,) = ranks.run(1, shapes_of, model, timeout=60.0)
    assert sum(map(math.prod, shapes.values())) == model_cost(model, 4096).total
