"""What benchmarks.kernels times is what it says: every contender computes the same product, on a CPU in Triton's
interpreter. How long one takes only a GPU can tell."""

import pytest
import torch
from torch import Tensor

from benchmarks import kernels
from tests.ops.test_grouped_mlp import relative

SHAPE = (1, 130, 256, 128)
"""One expert, whose product is the dense one."""
FP8, BF16 = 0.04, 5e-3  # how far a product is from the dense one


def run(entries: kernels.Benchmark) -> dict[str, Tensor]:
    return {name: step() for name, step in entries.items() if not name.startswith(kernels.MAY_FAIL)}


@pytest.mark.parametrize("benchmark", [kernels.products, kernels.in_place])
def test_forward_products_are_the_dense_one(benchmark, device: torch.device) -> None:
    torch.manual_seed(0)
    results = run(benchmark(*SHAPE, device))
    forward = {name: y for name, y in results.items() if "forward" in name or "grouped_mm" in name}
    assert len(forward) == {kernels.products: 3, kernels.in_place: 4}[benchmark]
    for name, y in forward.items():
        assert relative(y.float(), results["dense"].float()) < (FP8 if name.startswith("fp8") else BF16), name


def test_rows_in_place_are_the_gathered_rows(device: torch.device) -> None:
    torch.manual_seed(0)
    results = run(kernels.in_place(2, 130, 256, 128, device))
    pairs = [name.removesuffix(", read in place") for name in results if name.endswith(", read in place")]
    assert len(pairs) == 4
    for name in pairs:
        assert torch.equal(results[f"{name}, read in place"], results[f"{name}, gathered before"]), name


def test_gradients_in_fp8_are_those_in_bf16(device: torch.device) -> None:
    torch.manual_seed(0)
    results = run(kernels.products(*SHAPE, device))
    for gradient in ("input gradient", "weight gradient"):
        assert relative(results[f"fp8 {gradient}"].float(), results[f"bf16 {gradient}"].float()) < FP8


def test_whole_experts_agree(device: torch.device) -> None:
    torch.manual_seed(0)
    results = run(kernels.whole_experts(2, 130, 128, 128, device))
    first = results.pop("experts, torch grouped_mm")
    assert len(results) == 4
    for name, other in results.items():
        bar = 2 * BF16 if "bf16" in name.split(",")[1] else 0.09  # several products: test_layers.py
        assert [relative(a.float(), b.float()) < bar for a, b in zip(other, first, strict=True)] == [True] * 3, name
