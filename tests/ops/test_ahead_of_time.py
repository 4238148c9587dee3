"""What the kernels become on GPUs that are not here: Hopper (9.0) and Blackwell (10.0)."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")


@pytest.fixture(scope="module")
def code() -> dict[str, dict[str, dict[str, int]]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.ahead_of_time", "90", "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "capability, kind, instruction",
    [("90", "bf16", "wgmma bf16"), ("90", "fp8", "wgmma fp8"), ("100", "bf16", "tcgen05"), ("100", "fp8", "tcgen05")],
)
def test_products_use_the_tensor_cores_of_the_generation(code, capability: str, kind: str, instruction: str) -> None:
    """And copy ahead while they compute; the instructions of older generations would be several times slower."""
    products = {name: counts for name, counts in code[capability].items() if kind in name.split()}
    assert len(products) == {"bf16": 6, "fp8": 4}[kind]
    for name, counts in products.items():
        assert counts[instruction] > 0 and counts["older tensor core"] == 0, (name, counts)
        assert counts["asynchronous copies"] > 0, (name, counts)


@pytest.mark.parametrize("capability", ["90", "100"])
def test_nothing_spills_and_shared_memory_suffices(code, capability: str) -> None:
    for name, counts in code[capability].items():
        assert counts["spills"] == 0 and counts["shared"] <= 227 * 1024, (name, counts)


def test_other_row_counts_compile_no_further_kernel() -> None:
    """Row counts change at every step: a kernel that is compiled anew for some of them stalls the run for seconds."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.specialisations"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for precision, (first, *later) in json.loads(done.stdout).items():
        assert {"grouped_product", "grouped_weight_gradient", "activate", "activate_back"} <= set(first), precision
        assert later == [[]] * 6, precision
