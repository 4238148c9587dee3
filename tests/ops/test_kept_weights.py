"""What lies beside the parameters for FP8 products on a GPU is what the plan of a run counts."""

import pytest
import torch

from conf.schema import ClusterConfig, Config, Fp8Config, MoeConfig
from models.decoder import ModelChunk
from ops.experts import ExpertBackend
from ops.fp8 import Float8
from ops.fp8_numerics import RECIPES
from parallel.layout import Layout
from parallel.process_groups import Runtime
from tests.moe import helpers
from tests.ops.scaled_mm import OnGPU
from training.memory_estimate import memory_per_rank


@pytest.mark.parametrize("recipe", RECIPES)
def test_kept_weights_are_counted(
    recipe: str, runtime: Runtime, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dense layer and a sparse one with a shared expert; a third layer stays in bf16."""
    from ops.triton.gemm_backend import Float8GemmBackend
    from ops.triton.scaled_mm import ScaledMmBackend

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", OnGPU())
    moe = MoeConfig(num_experts=2, every=2, num_shared_experts=1)
    model = helpers.tiny(moe, num_layers=3, hidden_size=256, ffn_hidden_size=128, num_query_groups=1)
    settings = Config(model=model, precision="fp8", fp8=Fp8Config(recipe=recipe, last_layers_high=1))
    settings.cluster = ClusterConfig(gpus=True)
    float8 = Float8(ExpertBackend.on(Float8GemmBackend(RECIPES[recipe])), ScaledMmBackend(RECIPES[recipe]), range(2))
    context = helpers.build_context(model, runtime, torch.bfloat16, float8=float8)
    stage = ModelChunk(context, chunk=0, sequence_length=8, document_mask=False)
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=runtime.device)
    stage(tokens, torch.arange(8, device=runtime.device)[None], tokens)
    counted = memory_per_rank(settings, Layout(1), bf16=True).fp8_weights
    # A few scales more: torch wants them in fours.
    assert counted == pytest.approx(helpers.fp8_weight_bytes(stage), rel=1e-3)
