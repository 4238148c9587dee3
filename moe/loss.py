"""The loss of every token, over a vocabulary that may be cut.

Legend: R tokens (any shape), V vocabulary (this rank's slice).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.blocks import rows_at_once
from parallel.collectives import all_gather


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_RV: Tensor, labels_R: Tensor, group: dist.ProcessGroup) -> Tensor:
        vocabulary = logits_RV.shape[1]
        local_R = labels_R - group.rank() * vocabulary
        mine_R = (local_R >= 0) & (local_R < vocabulary)
        local_R = local_R.where(mine_R, 0)
        ctx.rows = rows_at_once(vocabulary, logits_RV.device)
        lse_R = torch.cat([block.float().logsumexp(1) for block in logits_RV.split(ctx.rows)])
        label_R = logits_RV.gather(1, local_R[:, None]).squeeze(1).float() * mine_R
        if group.size() > 1:
            parts_P2R = all_gather(torch.stack((lse_R, label_R))[None], group)
            lse_R, label_R = parts_P2R[:, 0].logsumexp(0), parts_P2R[:, 1].sum(0)
        ctx.save_for_backward(logits_RV, lse_R, local_R, mine_R)
        return lse_R - label_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R: Tensor) -> tuple[Tensor, None, None]:
        dlogits_RV = torch.empty_like(ctx.saved_tensors[0])
        parts = (t.split(ctx.rows) for t in (*ctx.saved_tensors, grad_R, dlogits_RV))
        for logits, lse, local, mine, grad, dlogits in zip(*parts, strict=True):
            d = (logits - lse[:, None]).exp_()  # fp32, as lse is
            d.scatter_add_(1, local[:, None], -mine[:, None].to(d.dtype))
            dlogits.copy_(d.mul_(grad[:, None]))
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
