"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): further layers that predict tokens beyond the
next one, in training only.

Legend: S sequence (this rank's slice), B batch, D hidden, K layers for multi-token prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.mla import replicated
from ops.linear import LinearSpec
from parallel.activation_checkpoint import checkpoint_without_output
from parallel.batch_context import BatchContext

if TYPE_CHECKING:  # which imports this module
    from models.decoder import Attend, Block, ModelBuildContext


class MTPLayer(nn.Module):
    """Layer k (eq. 21 to 23): the output of layer k - 1 and the embedding of the token k ahead, each after a norm, are
    projected to the input of a transformer block. Names are those of Megatron-Core and of DeepSeek's checkpoints.

    As in Megatron-Core, the first layer starts from the output of the model's final norm, and each has a final norm of
    its own, whose output goes both to the head and to the next layer.
    """

    def __init__(self, context: "ModelBuildContext", block: "Block"):
        super().__init__()
        model = context.model
        self.enorm, self.hnorm, self.final_norm = (context.norm() for _ in range(3))
        # Not sharded: under sequence parallelism each rank projects its own tokens, without communication.
        sizes = 2 * model.hidden_size, model.hidden_size
        spec = LinearSpec(*sizes, False, context.config, context.runtime.groups.tp)
        self.eh_proj = replicated(context.ops.linear, model, spec)
        self.block = block
        self.recompute = bool({"norm", "full"} & {*model.recompute})

    def forward(self, hidden_SBD: Tensor, embedding_SBD: Tensor, attend: "Attend", batch_ctx: BatchContext) -> Tensor:
        """Args:
            hidden_SBD: output of the layer before, of the token at each position.
            embedding_SBD: of the token k ahead of it.

        Returns:
            [S, B, D], the input of the head.
        """
        inputs = hidden_SBD, embedding_SBD
        if self.recompute:
            x_SBD, _ = checkpoint_without_output(self._joined, inputs, self.eh_proj)
        else:
            x_SBD, _ = self.eh_proj(self._joined(*inputs))
        return self.final_norm(self.block(x_SBD, attend, batch_ctx))

    def _joined(self, hidden_SBD: Tensor, embedding_SBD: Tensor) -> Tensor:
        return torch.cat((self.enorm(embedding_SBD), self.hnorm(hidden_SBD)), -1)


@dataclass(frozen=True)
class Targets:
    """What layer k reads and predicts, [B, S] over the whole sequence."""

    tokens_BS: Tensor
    """The token k ahead of each position."""
    labels_BS: Tensor
    """The token k + 1 ahead."""
    exists_BS: Tensor
    """Whether the latter lies within the sequence and, with document_mask, in the document of the position. Elsewhere
    tokens and labels have no meaning, and the position counts as padding."""
    weights_BS: Tensor
    """Its weight in the loss; 0 where it does not exist."""


def targets_of(batch_ctx: BatchContext, positions_BS: Tensor, layer: int, *, document_mask: bool) -> Targets:
    """Args:
    batch_ctx: has the labels and the loss mask of the whole sequence.
    layer: k, counted from 1.
    """
    labels_BS, mask_BS = batch_ctx.labels_BS, batch_ctx.loss_mask_BS
    assert labels_BS is not None
    length = labels_BS.shape[1]
    exists_BS = (torch.arange(length, device=labels_BS.device) < length - layer).expand_as(labels_BS)
    if document_mask:
        # A position 0 starts a document. Whether the token after the last position starts one is not known: it is left
        # out.
        document_BS = (positions_BS == 0).cumsum(1)
        exists_BS = document_BS == _ahead(document_BS, layer + 1, -1)
    ahead_BS = _ahead(labels_BS, layer, 0)
    weights_BS = exists_BS.float() if mask_BS is None else _ahead(mask_BS, layer, 0) * exists_BS
    return Targets(_ahead(labels_BS, layer - 1, 0), ahead_BS, exists_BS, weights_BS)


def _ahead(x_BS: Tensor, by: int, otherwise: int) -> Tensor:
    """At each position the value `by` positions later, or `otherwise` past the end."""
    filled_BS = torch.full_like(x_BS, otherwise)
    filled_BS[:, : x_BS.shape[1] - by] = x_BS[:, by:]
    return filled_BS


class MTPStatistics(nn.Module):
    """Running sums over this rank's tokens: of the weighted losses of each layer in nats, and of their weights."""

    sums_2K: Tensor

    def __init__(self, layers: int):
        super().__init__()
        # float64: counts stay exact and sums of many steps keep their digits.
        self.register_buffer("sums_2K", torch.zeros(2, layers, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def forward(self, layer: int, losses_BS: Tensor, weights_BS: Tensor) -> None:
        """Adds a pass to the sums. layer: counted from 0; losses_BS: weighted."""
        self.sums_2K[:, layer] += torch.stack([x.sum(dtype=torch.float64) for x in (losses_BS, weights_BS)])


def collect_losses(chunks: Sequence[Any], layers: int, device: torch.device) -> list[float]:
    """`local_loss_sums` and `mean_losses` with an all-reduce in between; nothing without such layers."""
    if not layers:
        return []
    sums_2K = local_loss_sums(chunks, layers, device)
    dist.all_reduce(sums_2K)
    return mean_losses(sums_2K)


def local_loss_sums(chunks: Sequence[Any], layers: int, device: torch.device) -> Tensor:
    """This rank's sums since the last call, fp64 [2, K], to be summed over all ranks.

    Args:
        chunks: this rank's pipeline chunks (ModelChunk).
        layers: model.mtp_num_layers.
    """
    sums_2K = torch.zeros(2, layers, dtype=torch.float64, device=device)
    for chunk in chunks:
        if chunk.mtp_statistics is not None:
            sums_2K += chunk.mtp_statistics.sums_2K
            chunk.mtp_statistics.sums_2K.zero_()
    return sums_2K


def mean_losses(sums_2K: Tensor) -> list[float]:
    """The mean loss of each layer, in nats per token that counts, of the sums over all ranks."""
    # Tensor-parallel ranks have the same, in both sums.
    return (sums_2K[0] / sums_2K[1].where(sums_2K[1] > 0, 1.0)).tolist()
