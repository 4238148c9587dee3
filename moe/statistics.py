"""What the routers did, summed on the device and read once per logged step.

Legend: T tokens of this rank, E experts, K choices per token, L sparse layers.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.load import ExpertLoad
from parallel.layout import Layout

SUMS = ("tokens", "dropped", "entropy", "aux_loss", "z_loss")


@dataclass(frozen=True)
class Report:
    """What one pass through a sparse layer counted over this rank's tokens. Returned by the layer and added up by its
    caller, so that a pass which is computed twice is counted once."""

    load_E: Tensor
    """Choices of each expert."""
    sums: Tensor
    """As in SUMS, float64."""

    @staticmethod
    @torch.no_grad()
    def of(probs_TE: Tensor, experts_TK: Tensor, keep_TK: Tensor, aux_loss: Tensor, z_loss: Tensor) -> "Report":
        """aux_loss, z_loss: this rank's parts, without their coefficients."""
        entropy = -torch.special.xlogy(probs_TE, probs_TE).sum()
        tokens = torch.full_like(entropy, probs_TE.shape[0])
        sums = torch.stack([tokens, (~keep_TK).sum(), entropy, aux_loss, z_loss]).double()
        return Report(torch.bincount(experts_TK.flatten(), minlength=probs_TE.shape[1]), sums)


class LoadStatistics(nn.Module):
    """One sparse layer's running sums over this rank's tokens."""

    def __init__(self, num_experts: int):
        super().__init__()
        # float64: counts stay exact and sums of many steps keep their digits.
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.float64), persistent=False)
        self.register_buffer("sums", torch.zeros(len(SUMS), dtype=torch.float64), persistent=False)

    def add(self, report: Report) -> None:
        self.load_E += report.load_E
        self.sums += report.sums

    def reset(self) -> None:
        self.load_E.zero_()
        self.sums.zero_()


def collect(
    parts: dict[int, LoadStatistics],
    layers: list[int],
    num_experts: int,
    layout: Layout,
    micro_batches: int,
    device: torch.device,
) -> ExpertLoad | None:
    """Adds up the statistics of all ranks and starts a new interval. Every rank calls this together.
    None for a dense model.

    Args:
        parts: this rank's sparse layers.
        layers: all sparse layers of the model, over all pipeline stages.
        micro_batches: global micro-batches of the interval.
    """
    if not layers:
        return None
    table = torch.zeros(len(layers), num_experts + len(SUMS), dtype=torch.float64, device=device)
    for index, layer in enumerate(layers):
        if layer in parts:
            table[index] = torch.cat([parts[layer].load_E, parts[layer].sums])
            parts[layer].reset()
    dist.all_reduce(table)
    # Without sequence parallelism all tensor-parallel ranks route the same tokens.
    whole = table.cpu().numpy() / (1 if layout.sequence_parallel else layout.tp)
    load_LE, (tokens, dropped, entropy, aux, z) = whole[:, :num_experts], whole[:, num_experts:].T
    choices = load_LE.sum(1).clip(min=1)
    return ExpertLoad(
        layers, load_LE, dropped / choices, entropy / tokens.clip(min=1), aux / micro_batches, z / micro_batches
    )
