"""RMSNorm in Triton against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.moe.helpers import assert_close, random

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, hidden", [(1, 8), (37, 200)])
def test_output_and_gradients(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """More rows than programs, rows of very different size, one so small that eps decides, a strided gradient."""
    from ops.triton.rms_norm import rms_norm

    x, weight, dy = random(rows, 1, hidden), random(hidden, seed=1), random(hidden, 1, rows, seed=2).permute(2, 1, 0)
    x[0] *= 1e-4
    x[-1] *= 1e3
    leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
    y = rms_norm(*leaves, 1e-6)
    gradients = torch.autograd.grad(y, leaves, dy.to(device, dtype))
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    wanted = F.rms_norm(exact[0], (hidden,), exact[1], 1e-6)
    wanted_gradients = torch.autograd.grad(wanted, exact, dy.to(dtype).double())
    bar = 1e-5 if dtype == torch.float32 else 1e-2
    for got, right in zip((y, *gradients), (wanted, *wanted_gradients), strict=True):
        assert got.dtype == dtype
        assert_close(got, right, bar)
    for got_row, right_row in zip(y, wanted, strict=True):  # each by its own size
        assert_close(got_row, right_row, bar)
