"""Rotary embeddings against those of Transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.schema import RopeScalingConfig
from models.hf.family import Family
from models.hf.rope import rope_settings, with_rope
from models.rope import Rotary
from tests.moe.helpers import random, tiny

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
SCALINGS = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 512,
    },
    YARN,
    YARN | {"partial_rotary_factor": 0.5, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    YARN | {"mscale": 0.707},
    YARN | {"attention_factor": 1.25},
    YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    {**YARN, "factor": None, "original_max_position_embeddings": 256},
]
POSITIONS_SB = torch.arange(600)[:, None]
FAMILY = Family("any", "Any", (), (), 1e4, {}, {}, {}, partial_rotary=1.0)


def theirs(parameters: dict[str, Any], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [S, W] by Transformers."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    partial = {"partial_rotary_factor": 1.0} | parameters
    config = transformers.Glm4MoeConfig(head_dim=width, max_position_embeddings=1024, rope_parameters=partial)
    return tuple(table[0] for table in Glm4MoeRotaryEmbedding(config)(torch.zeros(1), POSITIONS_SB.t()))


def ours(parameters: dict[str, Any], width: int) -> Rotary:
    settings, wrong = rope_settings({"rope_parameters": parameters, "max_position_embeddings": 1024}, FAMILY)
    assert not wrong
    width = int(width * settings["partial_rotary_factor"])
    return Rotary(width, settings["rope_theta"], 600, settings["rope_scaling"])


@pytest.mark.parametrize("parameters", SCALINGS, ids=str)
def test_angles_are_those_of_transformers(parameters: dict[str, Any]) -> None:
    wanted, got = theirs(parameters, 64), ours(parameters, 64)(POSITIONS_SB)
    for mine, other in zip(got, wanted, strict=True):
        # An angle of 600 has an error of 600 * 2^-24 in fp32.
        torch.testing.assert_close(mine[:, 0, 0], other[:, : mine.shape[-1]], rtol=0, atol=1e-4)
    frequencies = [torch.atan2(sin[1], cos[1]) for cos, sin in (wanted, [t[:, 0, 0] for t in got])]
    torch.testing.assert_close(frequencies[1], frequencies[0][: len(frequencies[1])], rtol=1e-6, atol=0)


@pytest.mark.parametrize("parameters", SCALINGS, ids=str)
def test_scaling_comes_back_from_a_config_json(parameters: dict[str, Any]) -> None:
    given = {"rope_parameters": parameters, "max_position_embeddings": 1024}
    settings, _ = rope_settings(given, FAMILY)
    model = tiny(**settings)
    assert model.rope_scaling.mscale is None or model.rope_scaling.mscale_all_dim
    assert with_rope(given, FAMILY, model) is given
    for base in ({}, {"rope_parameters": {"rope_theta": 3.0}}):
        assert rope_settings(with_rope(base, FAMILY, model), FAMILY) == (settings, [])


@pytest.mark.parametrize("length", [400, 512, 513])
def test_longrope_divides_by_the_factors_of_the_length(length: int) -> None:
    """As Transformers' function does. Its PhimoeRotaryEmbedding does not tell it the length, so that it has the short
    factors whatever the length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    generator = torch.Generator().manual_seed(1)
    short, long = ((1 + 9 * torch.rand(8, generator=generator)).tolist() for _ in range(2))
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512}
    parameters |= {"short_factor": short, "long_factor": long, "short_mscale": 1.5, "long_mscale": 1.25}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 1024}
    config = transformers.PhimoeConfig(**sizes, rope_parameters=parameters)
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
    settings, wrong = rope_settings({"rope_parameters": parameters}, replace(FAMILY, rope_types=("longrope",)))
    assert not wrong
    cos, sin = Rotary(16, 1e4, 600, settings["rope_scaling"])(torch.arange(9)[:, None], length)
    angles, mscale = torch.arange(9.0)[:, None] * frequencies, 1.5 if length <= 512 else 1.25
    torch.testing.assert_close(cos[:, 0, 0], angles.cos() * mscale, rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[:, 0, 0], angles.sin() * mscale, rtol=0, atol=1e-5)
    family = replace(FAMILY, rope_types=("longrope",))
    assert rope_settings(with_rope({}, family, tiny(**settings)), family) == (settings, [])


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "deepseek_v2"])
def test_rotations_are_those_of_transformers(name: str) -> None:
    """Of half a head, of adjacent pairs that come out as halves, and of adjacent pairs that stay where they are."""
    q, k = (random(9, 2, 3, 16, seed=seed).requires_grad_() for seed in (1, 2))
    above = random(9, 2, 3, 3, seed=3)
    rotary = Rotary(8 if name == "glm4_moe" else 16, 100.0, 64, RopeScalingConfig("linear", factor=1.5))
    cos, sin = rotary(torch.arange(9)[:, None].expand(9, 2))
    interleave = name != "glm4_moe"
    q_out, k_out = (Rotary.rotate(t, cos, sin, interleave=interleave) for t in (q, k))
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
    # As Transformers has them: [B, H, S, N], and angles [B, S, W] or complex numbers.
    q_BHSN, k_BHSN = (t.detach().permute(1, 2, 0, 3).requires_grad_() for t in (q, k))
    if name == "deepseek_v2":
        angles = torch.complex(cos, sin)[:, :, 0].transpose(0, 1)
        wanted = module.apply_rotary_emb(q_BHSN, k_BHSN, angles)
    else:
        tables = (torch.cat([t, t], -1)[:, :, 0].transpose(0, 1) for t in (cos, sin))
        rotate = module.apply_rotary_pos_emb_interleave if interleave else module.apply_rotary_pos_emb
        wanted = rotate(q_BHSN, k_BHSN, *tables)
    if name != "deepseek_v2":
        for mine, other in zip((q_out, k_out), wanted, strict=True):
            torch.testing.assert_close(mine.permute(1, 2, 0, 3), other, rtol=1e-5, atol=1e-6)
    # Scores do not depend on the order of the dimensions.
    scores = [torch.einsum("sbhn,sbgn->sbhg", q_out, k_out), torch.einsum("bhsn,bgsn->sbhg", *wanted)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    for score in scores:
        (score * above).sum().backward()
    for mine, other in ((q, q_BHSN), (k, k_BHSN)):
        torch.testing.assert_close(mine.grad.permute(1, 2, 0, 3), other.grad, rtol=1e-5, atol=1e-5)
