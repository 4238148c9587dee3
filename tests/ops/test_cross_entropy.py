"""The loss of every token in Triton, whole or cut over ranks, against torch's in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conf.schema import ParallelConfig
from ops.cross_entropy import CROSS_ENTROPY, SoftCap, _Alone, token_losses
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random, run_context, selected, tiny
from tests.parallel.helpers import started

TOKENS, VOCABULARY = 7, 5000


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of which one row is huge, one far below zero and one all alike; labels at both ends; gradients."""
    logits_TV = 3 * random(TOKENS, VOCABULARY)
    logits_TV[1] += 1000
    logits_TV[2] -= 1000
    logits_TV[3] = 0
    labels_T = torch.tensor([0, 1, VOCABULARY - 1, 2500, 4999, 2499, 4096])
    return logits_TV.to(dtype), labels_T, random(TOKENS, seed=1)


def wanted(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits_TV, labels_T, grad_T = case(dtype)
    leaf = logits_TV.double().requires_grad_()
    losses_T = F.cross_entropy(leaf, labels_T, reduction="none")
    losses_T.backward(grad_T.double())
    return losses_T.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients(dtype: torch.dtype, device: torch.device) -> None:
    from ops.triton import cross_entropy

    logits_TV, labels_T, grad_T = (t.to(device) for t in case(dtype))
    leaf = logits_TV.requires_grad_()
    losses_T = cross_entropy.token_losses(leaf * 1, labels_T, _Alone())
    losses_T.backward(grad_T)
    values, gradient = wanted(dtype)
    assert losses_T.dtype == torch.float32 and leaf.grad.dtype == dtype
    assert_close(losses_T, values, 1e-6)
    assert_close(leaf.grad, gradient, 1e-5 if dtype == torch.float32 else 4e-3)


def cut(world: World) -> tuple[Tensor, Tensor]:
    """Losses and this rank's slice of the gradient (rank function)."""
    from ops.triton import cross_entropy

    with started(world, ParallelConfig(tp=world.size)) as runtime:
        logits_TV, labels_T, grad_T = (t.to(runtime.device) for t in case(torch.float32))
        leaf = logits_TV.chunk(world.size, 1)[dist.get_rank()].clone().requires_grad_()
        losses_T = cross_entropy.token_losses(leaf * 1, labels_T, runtime.groups.tp)
        losses_T.backward(grad_T)
        return losses_T.detach().cpu(), leaf.grad.cpu()


def test_a_vocabulary_cut_over_ranks(ranks, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the ranks of the pool share one GPU, which NCCL refuses")
    every = ranks.run(2, cut, timeout=120)
    values, gradient = wanted(torch.float32)
    for losses_T, _ in every:
        assert_close(losses_T, values, 1e-6)
    assert_close(torch.cat([grad for _, grad in every], 1), gradient)


def test_the_gradient_takes_the_place_of_the_logits(device: torch.device) -> None:
    from ops.triton import cross_entropy

    logits_TV, labels_T, _ = (t.to(device) for t in case(torch.float32))
    passed = logits_TV.requires_grad_() * 1
    losses_T = cross_entropy.token_losses(passed, labels_T, _Alone())
    (gradient,) = torch.autograd.grad(losses_T.sum(), passed, retain_graph=True)
    assert gradient.data_ptr() == passed.data_ptr()
    with pytest.raises(AssertionError, match="no second backward pass"):
        losses_T.sum().backward()


def test_triton_is_for_gpus(runtime: Runtime) -> None:
    chosen, row = selected(CROSS_ENTROPY, run_context(tiny(), runtime, device=torch.device("cpu")))
    assert chosen is token_losses and row.why == "no copy of the logits in fp32"


class _ViewOfCopy(torch.autograd.Function):
    """As TransformerEngine's layers return their output, which autograd does not let anyone change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone().flatten().view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_soft_capped_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.cross_entropy.rows_at_once", lambda *_: 4)
    logits, above = 3 * random(3, 5, 7), random(3, 5, 7, seed=1)
    leaf, got = (logits.to(dtype).requires_grad_() for _ in range(2))
    wanted = 2.5 * torch.tanh(leaf.float() / 2.5)
    passed = _ViewOfCopy.apply(got)
    capped = SoftCap.apply(passed, 2.5)
    assert capped.data_ptr() == passed.data_ptr()
    assert_close(capped, wanted.double(), 1e-6 if dtype == torch.float64 else 4e-3)
    gradients = [torch.autograd.grad(out, t, above.to(out.dtype))[0] for out, t in ((wanted, leaf), (capped, got))]
    assert_close(gradients[1], gradients[0].double(), 1e-5 if dtype == torch.float64 else 8e-3)
