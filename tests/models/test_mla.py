"""Latent attention: documents, recomputation, FP8 and the settings of published models. That it computes what
Transformers does is tested with the families that have it (tests/models/hf), its layouts by the parity matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import Outcome
from benchmarks.tiny import Variant
from conf.schema import ModelConfig, ParallelConfig
from models.init import initialise
from models.megatron_config import transformer_config
from models.mla import LatentAttention
from models.rope import Rotary
from ops.attention_pieces import attention_pieces
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random, tiny
from tests.ops.test_grouped_mlp import assert_same
from tests.parallel.helpers import measure

BLOCKWISE = RECIPES["blockwise"]
LATENT = {"num_attention_heads": 4, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
"""Positions of two sequences of three and two documents."""


def attend(layer: LatentAttention, model: ModelConfig, x_SBD: Tensor, positions_BS: Tensor, mask: bool) -> Tensor:
    device = layer.out.weight.device
    cos, sin = Rotary(model.rotary_width, model.rope_theta, 64).to(device)(positions_BS.t().to(device))
    return layer(x_SBD.to(device), cos, sin, attention_pieces(positions_BS, 0, 1, mask))


@pytest.mark.parametrize("queries", [{}, {"q_lora_rank": 5}], ids=str)
def test_document_mask_equals_each_document_alone(queries: dict[str, Any], runtime: Runtime) -> None:
    model = tiny(hidden_size=16, **LATENT, **queries)
    config = transformer_config(model, runtime, torch.float32, deterministic=False)
    layer = LatentAttention(model, config, runtime.groups).to(runtime.device)
    initialise(layer, seed=1)
    x_SBD = random(8, 2, 16)
    packed_SBD = attend(layer, model, x_SBD, PACKED, True)
    for b, lengths in enumerate(([4, 3, 1], [2, 6])):
        alone = [
            attend(layer, model, x_SD.unsqueeze(1), torch.arange(len(x_SD))[None], False)
            for x_SD in x_SBD[:, b].split(lengths)
        ]
        assert_close(packed_SBD[:, b : b + 1], torch.cat(alone).detach().cpu().double())


# With seed 1 a value falls on the other side of a rounding to FP8 when a sum has another order, and takes others along.
SIZES = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 256, "num_query_groups": None}
SIZES |= {"kv_lora_rank": 128, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
VARIANTS = {
    "plain": Variant(SIZES, {"every": 2}, seed=2),
    "reference": Variant(SIZES, {"every": 2}, seed=2, gemm=Reference()),
    "fp8": Variant(SIZES, {"every": 2}, seed=2, gemm=Reference(BLOCKWISE)),
    "full": Variant(SIZES | {"recompute": ["full"]}, {"every": 2}, seed=2),
    "norm": Variant(SIZES | {"recompute": ["activation", "norm"]}, {"every": 2}, seed=2),
}


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Outcome]:
    return ranks.run(1, measure, ParallelConfig(), VARIANTS, timeout=120)[0]


@pytest.mark.parametrize("recompute", ["full", "norm"])
def test_recompute_computes_the_same(one_rank, recompute: str) -> None:
    assert_same(one_rank[recompute], one_rank["plain"], 1e-6)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_fp8_layers_keep_their_collectives(ranks, one_rank, degrees: dict[str, Any]) -> None:
    """As tests.ops.test_grouped_mlp.test_linear_layers_keep_their_collectives."""
    every = ranks.run(2, measure, ParallelConfig(**degrees), {k: VARIANTS[k] for k in ("reference", "fp8")})
    assert_same(every[0]["reference"], one_rank["plain"], 1e-5)
    assert_same(every[0]["fp8"], one_rank["fp8"], 2e-3, steps=1)
    assert (every[0]["fp8"].logits_V != every[0]["reference"].logits_V).any()
