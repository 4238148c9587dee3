"""The loss of every token, over a vocabulary that may be cut.

Legend: R tokens (any shape), V vocabulary (this rank's slice).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.cpp import build as native
from ops.registry import Candidate, Choice, select
from parallel.chunked_ops import rows_at_once
from parallel.collectives import all_gather


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_RV: Tensor, labels_R: Tensor, group: dist.ProcessGroup) -> Tensor:
        vocabulary = logits_RV.shape[1]
        local_R = labels_R - group.rank() * vocabulary
        mine_R = (local_R >= 0) & (local_R < vocabulary)
        local_R = local_R.where(mine_R, 0)
        ctx.rows = rows_at_once(vocabulary, logits_RV.device)
        # Of all probability, the share of this rank's slice of the vocabulary. softmax and log_softmax pass over a row
        # once, which takes two thirds of the time of exp and logsumexp.
        share_R = torch.ones_like(local_R, dtype=torch.float32)
        if group.size() == 1:
            parts = zip(logits_RV.split(ctx.rows), local_R[:, None].split(ctx.rows), strict=True)
            loss_R = -torch.cat([logits.log_softmax(1, torch.float32).gather(1, at) for logits, at in parts]).squeeze(1)
        else:
            mine_lse_R = torch.cat([block.float().logsumexp(1) for block in logits_RV.split(ctx.rows)])
            label_R = logits_RV.gather(1, local_R[:, None]).squeeze(1).float().where(mine_R, 0)
            parts_P2R = all_gather(torch.stack((mine_lse_R, label_R))[None], group)
            lse_R = parts_P2R[:, 0].logsumexp(0)
            loss_R, share_R = lse_R - parts_P2R[:, 1].sum(0), (mine_lse_R - lse_R).exp_()
        ctx.save_for_backward(logits_RV, local_R, mine_R, share_R)
        return loss_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R: Tensor) -> tuple[Tensor, None, None]:
        dlogits_RV = torch.empty_like(ctx.saved_tensors[0])
        parts = (t.split(ctx.rows) for t in (*ctx.saved_tensors, grad_R, dlogits_RV))
        for logits, local, mine, share, grad, dlogits in zip(*parts, strict=True):
            d = logits.softmax(1, torch.float32).mul_((share * grad)[:, None])
            dlogits.copy_(d.scatter_add_(1, local[:, None], -(mine * grad)[:, None]))
        return dlogits_RV, None, None


def token_losses(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Cross-entropy of every token in nats, fp32, in the shape of `labels`. Logits are kept in their own precision for
    the backward pass, and no fp32 copy of all of them is ever made.

    Args:
        logits: [..., V].
        labels: indices into the whole vocabulary.
        group: the ranks that each hold an equal slice of the vocabulary, in order.
    """
    return _TokenLoss.apply(logits.flatten(0, -2), labels.flatten(), group).view(labels.shape)


TokenLosses = Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]
"""The arguments and the result of `token_losses`."""


def _triton_token_losses() -> TokenLosses:
    from ops.triton.cross_entropy import token_losses

    return token_losses


def _native_token_losses() -> TokenLosses:
    from ops.cpp.rows import token_losses

    return token_losses


class _Alone:
    """Stands for a group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def choose_token_losses(device: torch.device, dtype: torch.dtype) -> tuple[TokenLosses, Choice]:
    """Triton's on a GPU, or ours in C++ on a CPU that it is made for, where they equal these here."""

    def run(losses: TokenLosses) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = (4 * torch.randn(9, 5000, generator=generator)).to(device, dtype).requires_grad_()
        labels = torch.tensor([0, 3, 999, 4999, 4096, 7, 7, 500, 1], device=device)
        values = losses(logits * 1, labels, _Alone())
        values.backward(torch.linspace(-1, 1, 9, device=device))
        return [values.detach(), logits.grad]

    part, plain = "loss", ("torch, in blocks", token_losses)
    if device.type == "cuda":
        faster = Candidate("Triton", _triton_token_losses)
    elif native.made_for(device, dtype):
        faster = native.candidate(_native_token_losses)
    else:
        return token_losses, Choice(part, plain[0], "no copy of the logits in fp32")
    return select(part, [faster], plain, run, 1e-5 if dtype == torch.float32 else 1e-2)
