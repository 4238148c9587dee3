"""The update of a block of weights in Triton, compared with the one in plain PyTorch."""

from dataclasses import replace

import pytest
import torch

from parallel.block_update import Block, in_torch
from parallel.optimizers import OPTIMIZERS

STEPS = [(), [(10, 30, 20)], [(10, 10, 10), (2000, 0, 4000)]]
"""Sharding.index_steps: not sharded; the third of four columns; the second of two columns and the third of rows."""


def block(
    device: str | torch.device, dtype: torch.dtype, size: int, *, model: bool = True, steps: object = STEPS[2]
) -> Block:
    generator = torch.Generator().manual_seed(1)

    def randn() -> torch.Tensor:
        return torch.randn(size, generator=generator)

    weight, gradient, state = randn(), randn(), {"exp_avg": randn(), "exp_avg_sq": randn().square()}
    return Block(
        weight.to(device),
        gradient.to(dtype).to(device),
        {name: kept.to(dtype).to(device) for name, kept in state.items()},
        torch.full((size,), float("nan")).bfloat16().to(device) if model else None,
        grad_scale=0.3,
        seed=-123456,
        first=77,
        index_steps=steps,
        step=3,
        lr=1e-2,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
    )


def assert_alike(got: Block, wanted: Block) -> None:
    """Up to the last bit of fp32. Of bf16 states nearly all are equal, which other random bits would not give."""
    torch.testing.assert_close(got.weight.cpu(), wanted.weight.cpu(), rtol=1e-5, atol=1e-6)
    for name, kept in wanted.state.items():
        mine = got.state[name].cpu()
        if kept.dtype == torch.bfloat16:
            assert (mine != kept.cpu()).double().mean() < 1e-3
        torch.testing.assert_close(
            mine.float(), kept.cpu().float(), rtol=1e-2 if kept.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    if wanted.model_weight is not None:
        assert got.model_weight is not None
        # Triton's interpreter cuts fp32 off where a GPU rounds it to bf16.
        bar = 0 if got.weight.is_cuda else 2**-7
        torch.testing.assert_close(got.model_weight, got.weight.bfloat16(), rtol=bar, atol=0)


@pytest.mark.parametrize("steps", STEPS, ids=["whole", "columns", "columns and rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1500])
def test_triton_equals_torch(device, dtype, size, steps):
    from ops.triton.adamw import update

    got, wanted = (block(device, dtype, size, steps=steps, model=size > 1) for _ in range(2))
    for step in range(3, 5):
        update(replace(got, step=step))
        in_torch(OPTIMIZERS["adamw"])(replace(wanted, step=step))
        assert_alike(got, wanted)
