"""TransformerEngine and Apex on the GPU, where they are installed: every implementation that calls them reproduces its
reference. Skips, with the reason, where a package cannot be imported."""

from typing import Any

import pytest
import torch

from tests.gpu.packages import RECIPES, implementations, missing, recipe_verified, verified

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CASES = {name: rest for name, *rest in implementations()}


@pytest.mark.parametrize("name", CASES)
def test_it_reproduces_the_reference(name: str, runtime: Any) -> None:
    package = "apex" if "Apex" in name else "transformer_engine.pytorch"
    package = "fused_weight_gradient_mlp_cuda" if name == "weight gradients: Apex" else package
    if why := missing(package):
        pytest.skip(f"{package} is not importable ({why})")
    passed, why = verified(*CASES[name], runtime)
    assert passed, why


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_close_to_bf16_or_refused_for_the_gpu(recipe: str, runtime: Any) -> None:
    if why := missing("transformer_engine.pytorch"):
        pytest.skip(f"transformer_engine.pytorch is not importable ({why})")
    passed, why = recipe_verified(recipe, runtime)
    assert passed or "is not for this GPU" in why or "or newer, and" in why, why
