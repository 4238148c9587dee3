"""Cross-entropy of every token, over a vocabulary that may be sharded.

Legend: R tokens (any shape), V vocabulary (this rank's slice).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.operation import Implementation, Operation
from ops.run_context import RunContext
from parallel.chunked_ops import rows_at_once
from parallel.collectives import all_gather


class SoftCap(torch.autograd.Function):
    """cap * tanh(logits / cap), in place, in fp32 block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        # The same memory: what TransformerEngine's layers return is a view that autograd lets nobody mark as changed.
        capped = logits.detach()
        for block in _row_blocks(capped):
            block.copy_((block.float() / cap).tanh_().mul_(cap))
        ctx.save_for_backward(capped)
        ctx.cap = cap
        return capped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (capped,) = ctx.saved_tensors
        dlogits = torch.empty_like(capped)
        for block, above, below in zip(*map(_row_blocks, (capped, grad, dlogits)), strict=True):
            below.copy_((block.float() / ctx.cap).square_().neg_().add_(1).mul_(above))
        return dlogits, None


def _row_blocks(logits: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows."""
    return logits.flatten(0, -2).split(rows_at_once(logits.shape[-1], logits.device))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, labels_R: Tensor, group: dist.ProcessGroup) -> Tensor:
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
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
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


class _Alone:
    """Stands for a group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _trial(losses: TokenLosses, context: RunContext) -> list[Tensor]:
    """Nine tokens over this rank's shard of the vocabulary."""
    vocabulary = context.model.vocab_size // context.groups.tp.size()
    logits = (4 * context.randn(9, vocabulary, dtype=torch.float32)).to(context.dtype).requires_grad_()
    labels = torch.tensor([0, 3, 999, 4999, 4096, 7, 7, 500, vocabulary - 1], device=context.device) % vocabulary
    values = losses(logits * 1, labels, cast("dist.ProcessGroup", _Alone()))
    (gradient,) = torch.autograd.grad(values, logits, torch.linspace(-1, 1, 9, device=context.device))
    return [values.detach(), gradient]


CROSS_ENTROPY = Operation(
    field="token_losses",
    name="loss",
    reference=lambda context: Implementation(
        "torch, in blocks", lambda context: token_losses, "no copy of the logits in fp32"
    ),
    implementations=[Implementation("Triton", "ops.triton.cross_entropy:token_losses", device="cuda")],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2},
)
