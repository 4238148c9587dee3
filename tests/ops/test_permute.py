"""Tokens to rows and back in Triton and in C++, against plain torch in fp64 and its gradients."""

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig, MoeConfig
from ops.permute import PERMUTATION, Permutation, TorchPermutation
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random, run_context, selected
from tests.ops.test_cpp_rows import assert_rounded

TOKENS, HIDDEN, TOP_K = 6, 1100, 3
# Of the 18 choices some are dropped; 18 is none: an empty slot. Token 4 has no row, token 0 has all three.
CHOICES = {"some": [2, 0, 9, 1, 17, 5, 18, 18, 16], "all": [*range(17, -1, -1)], "none": []}
CPU = torch.device("cpu")
MODEL = ModelConfig(hidden_size=80, moe=MoeConfig(num_experts=4, top_k=2))
pytestmark = pytest.mark.usefixtures("poisoned")


def there_and_back(
    permutation: Permutation,
    device: torch.device,
    choices: list[int],
    values: torch.dtype,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Rows, their weighted sum, and the gradients of tokens, rows and gates, of numbers rounded to `values` in
    arithmetic of `dtype`; operands are strided."""

    def draw(*shape: int, seed: int) -> Tensor:
        return random(*shape, seed=seed).to(values).to(device, dtype or values)

    choice_R = torch.tensor(choices, dtype=torch.int64, device=device)
    x_TD = draw(HIDDEN, TOKENS, seed=0).t().requires_grad_()
    gates_TK = random(TOP_K, TOKENS, seed=1).t().to(device).requires_grad_()
    taken_RD = permutation.permute(x_TD, choice_R, TOP_K, True)
    y_RD = draw(HIDDEN, len(choices), seed=4).t().requires_grad_()
    out_TD = permutation.unpermute(y_RD, choice_R, gates_TK, True)
    gradients = torch.autograd.grad(out_TD, (y_RD, gates_TK), draw(TOKENS, HIDDEN, seed=2))
    (back_TD,) = torch.autograd.grad(taken_RD, x_TD, draw(*taken_RD.shape, seed=3))
    return [taken_RD, out_TD, *gradients, back_TD]


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_torch(choices: list[int], dtype: torch.dtype, device: torch.device) -> None:
    from ops.triton.permute import PERMUTATION as KERNELS

    got = there_and_back(KERNELS, device, choices, dtype)
    wanted = there_and_back(TorchPermutation(), device, choices, dtype, torch.float64)
    for a, b in zip(got, wanted, strict=True):
        if b.numel():
            assert_close(a, b, 1e-6 if a.dtype == torch.float32 else 4e-3)
    assert torch.equal(got[0].double(), wanted[0])


@pytest.mark.usefixtures("cpp_kernels")
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_in_cpp_values_are_those_of_fp64(choices: list[int]) -> None:
    from ops.cpp.permutation import PERMUTATION as KERNELS

    got = there_and_back(KERNELS, CPU, choices, torch.bfloat16)
    wanted = there_and_back(TorchPermutation(), CPU, choices, torch.bfloat16, torch.float64)
    names = ("rows", "sums", "rows' gradient", "gates' gradient", "tokens' gradient")
    for name, a, b in zip(names, got, wanted, strict=True):
        if name == "gates' gradient":
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-4)  # of terms that add up to 900
        elif b.numel():
            assert_rounded(a, b.detach(), off=0.0 if name == "rows" else 1e-6)
    assert torch.equal(got[0].double(), wanted[0])


def test_plain_torch_on_a_cpu_in_fp32(runtime: Runtime) -> None:
    rows, row = selected(PERMUTATION, run_context(MODEL, runtime))
    assert isinstance(rows, TorchPermutation) and (row.operation, row.why) == (
        "permutation",
        "index_select and index_add",
    )


@pytest.mark.usefixtures("cpp_kernels")
def test_in_cpp_where_it_equals_torch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops.cpp.permutation import PERMUTATION as KERNELS

    context = run_context(MODEL, runtime, torch.bfloat16)
    assert selected(PERMUTATION, context)[0] is KERNELS
    monkeypatch.setattr(type(KERNELS.kernels), "gate_gradient", lambda self, rows, slot, grad, gates: gates)
    rows, row = selected(PERMUTATION, context)
    assert isinstance(rows, TorchPermutation) and "native differs from torch's by" in row.why and row.refused
