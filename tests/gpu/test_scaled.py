"""FP8 linear layers on the GPU's own scaled matrix product."""

import pytest
import torch

from conf.schema import Fp8Config, ModelConfig
from ops.fp8_numerics import RECIPES
from parallel.process_groups import Runtime
from tests.ops.test_scaled_mm import SHAPES, assert_equal_to_the_reference

HERE = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(HERE < (8, 9), reason="there is no CUDA device with FP8 products")]
SERVED = [name for name in RECIPES if name != "blockwise" or HERE[0] == 9]
"""By torch 2.13 on this GPU."""


@pytest.mark.parametrize("size", [*SHAPES, (4096, 2048, 5632)], ids=str)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("recipe", SERVED)
def test_linear_layers_equal_the_reference(recipe: str, narrow: bool, size: tuple[int, ...]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    assert_equal_to_the_reference(recipe, narrow, size, torch.device("cuda"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_choice_is_what_the_gpu_serves(recipe: str, runtime: Runtime) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    from ops.fp8 import FLOAT8
    from ops.triton.scaled_mm import ScaledMmBackend
    from tests.moe.helpers import run_context, selected

    model, fp8 = ModelConfig(num_layers=2, hidden_size=128), Fp8Config(recipe=recipe)
    chosen, row = selected(FLOAT8, run_context(model, runtime, torch.bfloat16, fp8=fp8, precision="fp8"))
    assert (type(chosen.linear) is ScaledMmBackend) == (recipe in SERVED), row.why
