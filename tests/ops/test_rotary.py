"""Rotation in Triton, compared with complex numbers in fp64."""

import pytest
import torch

from tests.moe.helpers import assert_close, random

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, width", [(1, 2), (11, 24), (8, 64)])
@pytest.mark.parametrize("backward", [False, True])
def test_pairs_are_turned_by_their_angles(dtype, heads, width, backward, device) -> None:
    """Of a slice of wider heads, into memory where heads come before the sequence."""
    from ops.triton.rotary import apply_rotary

    s, b = 5, 3
    wide = random(s, b, heads, 3 * width).to(device, dtype)
    x, angle = wide[..., width : 2 * width], random(s, b, 1, width // 2, seed=1).double().to(device) * 3
    whole = torch.empty(b, heads, s, width + 2, dtype=dtype, device=device)
    out = whole.permute(2, 0, 1, 3)[..., 1:-1]
    assert apply_rotary(x, angle.cos().float(), angle.sin().float(), out, backward=backward) is out
    exact = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), -angle if backward else angle)
    assert_close(out, torch.cat([exact.real, exact.imag], -1), 1e-5 if dtype == torch.float32 else 1e-2)
    assert whole[..., 0].isnan().all() and whole[..., -1].isnan().all()


def test_nothing_to_turn(device) -> None:
    from ops.triton.rotary import apply_rotary

    x = torch.empty(0, 2, 3, 4, device=device)
    assert apply_rotary(x, x[..., :1, :2], x[..., :1, :2], torch.empty_like(x)).shape == x.shape
