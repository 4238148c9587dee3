"""Tokens to rows and back in Triton, against plain torch and its gradients."""

import pytest
import torch
from torch import Tensor

from moe.rows import PlainRows, choose_rows
from tests.moe.helpers import assert_close, random

TOKENS, HIDDEN, TOP_K = 6, 1100, 3
# Of the 18 choices some are dropped; 18 is none: an empty slot. Token 4 has no row, token 0 has all three.
CHOICES = {"some": [2, 0, 9, 1, 17, 5, 18, 18, 16], "all": [*range(17, -1, -1)], "none": []}
pytestmark = pytest.mark.usefixtures("poisoned")


def there_and_back(rows, device: torch.device, choices: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Rows, their weighted sum, and the gradients of tokens, rows and gates; operands are strided."""
    choice_R = torch.tensor(choices, dtype=torch.int64, device=device)
    x_TD = random(HIDDEN, TOKENS).t().to(device, dtype).requires_grad_()
    gates_TK = random(TOP_K, TOKENS, seed=1).t().to(device).requires_grad_()
    taken_RD = rows.take(x_TD, choice_R, TOP_K, True)
    y_RD = (taken_RD.detach() * 1.5).requires_grad_()
    out_TD = rows.weighted_sum(y_RD, choice_R, gates_TK, True)
    gradients = torch.autograd.grad(out_TD, (y_RD, gates_TK), random(TOKENS, HIDDEN, seed=2).to(out_TD))
    (back_TD,) = torch.autograd.grad(taken_RD, x_TD, random(*taken_RD.shape, seed=3).to(taken_RD))
    return [taken_RD, out_TD, *gradients, back_TD]


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_torch(choices: list[int], dtype: torch.dtype, device: torch.device) -> None:
    from moe.kernels.rows import TritonRows

    got = there_and_back(TritonRows(), device, choices, dtype)
    wanted = there_and_back(PlainRows(), device, choices, torch.float32)
    for a, b in zip(got, wanted, strict=True):
        if b.numel():
            assert_close(a, b, 1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(got[0].float(), wanted[0].to(dtype).float())


def test_plain_torch_on_a_cpu() -> None:
    rows, choice = choose_rows(torch.device("cpu"), torch.bfloat16)
    assert isinstance(rows, PlainRows) and choice.part == "permutation"
