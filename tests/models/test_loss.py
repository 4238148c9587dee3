"""The loss of every token against torch's in float64, whole and cut over ranks."""

import pytest
import torch
import torch.nn.functional as F

from conf.schema import ParallelConfig
from ops.cross_entropy import token_losses
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random
from tests.parallel.helpers import started


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [7, 3, 12] of up to hundreds, whose exponentials overflow; labels in every quarter; gradients."""
    logits = (random(7, 3, 12) * torch.tensor([1.0, 100.0, 0.01]).view(1, 3, 1)).to(dtype)
    return logits, torch.arange(21).view(7, 3) * 5 % 12, random(7, 3, seed=1)


def wanted(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels, grad = case(dtype)
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(7, 3)
    losses.backward(grad.double())
    return losses.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_in_float64(dtype: torch.dtype, runtime: Runtime, monkeypatch) -> None:
    monkeypatch.setattr("parallel.chunked_ops.CPU_VALUES", 60 // torch.get_num_threads())
    logits, labels, grad = (t.to(runtime.device) for t in case(dtype))
    before = logits.clone()
    logits.requires_grad_()
    losses = token_losses(logits, labels, runtime.groups.tp)
    losses.backward(grad)
    assert losses.dtype == torch.float32 and logits.grad.dtype == dtype
    assert torch.equal(logits.detach(), before)
    assert_close(losses, wanted(dtype)[0])  # bf16 logits are exact in float64 as well
    if dtype == torch.float32:
        assert_close(logits.grad, wanted(dtype)[1])
    else:
        assert (logits.grad.double().cpu() - wanted(dtype)[1]).abs().max() < 2**-8 * 2


def masked(world: World) -> None:
    """Every third logit is impossible, the first of each rank among them, but for no label."""
    with started(world, ParallelConfig(tp=world.size)) as runtime:
        logits, labels = random(12, 12), torch.arange(12)
        logits[:, ::3] = -torch.inf
        logits[labels, labels] = 1.0
        whole = logits.double().requires_grad_()
        F.cross_entropy(whole, labels, reduction="sum").backward()
        mine = logits.chunk(world.size, -1)[world.rank].clone().to(runtime.device).requires_grad_()
        losses = token_losses(mine, labels.to(runtime.device), runtime.groups.tp)
        losses.sum().backward()
        assert_close(losses, F.cross_entropy(whole, labels, reduction="none").detach())
        assert_close(mine.grad, whole.grad.chunk(world.size, -1)[world.rank])


@pytest.mark.parametrize("count", [1, 4])
def test_logits_may_be_minus_infinity(count: int, ranks) -> None:
    ranks.run(count, masked, timeout=60)


def cut(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    with started(world, ParallelConfig(tp=world.size)) as runtime:
        logits, labels, grad = (t.to(runtime.device) for t in case(torch.float32))
        mine = logits.chunk(world.size, -1)[world.rank].clone().requires_grad_()
        losses = token_losses(mine, labels, runtime.groups.tp)
        losses.backward(grad)
        return losses.detach().cpu(), mine.grad.cpu()


def test_a_cut_vocabulary_changes_nothing(ranks) -> None:
    every = ranks.run(4, cut, timeout=60)
    losses, dlogits = wanted(torch.float32)
    for got, _ in every:
        assert_close(got, losses)
    assert_close(torch.cat([d for _, d in every], -1), dlogits)
