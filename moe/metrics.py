"""What the routers did, summed on the device and read once per logged step.

Legend: T tokens of this rank, E experts, K choices per token, L sparse layers.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.expert_load import ExpertLoad
from ops.routing import RouterStats, count_loads
from parallel.layout import Layout

SUMS = ("tokens", "dropped", "unserved", "entropy", "logit_square", "aux_loss", "z_loss")
"""Tokens; choices that were dropped; tokens that no expert computes; sums over tokens of the distribution's entropy and
of the mean squared logit; this rank's parts of the losses, without their coefficients."""


@dataclass(frozen=True)
class Report:
    """What one pass through a sparse layer counted over this rank's tokens. Returned by the layer and added up by its
    caller, so that a pass which is computed twice is counted once."""

    load_E: Tensor
    """Choices of each expert."""
    sums: Tensor
    """As in SUMS, float64."""
    counted_E: Tensor
    """What the balancing loss counts for each expert: its choices, or the best of the scores (Routing.counted_TK)."""

    @staticmethod
    @torch.no_grad()
    def of(
        router_stats: RouterStats,
        keep_TK: Tensor,
        losses: tuple[Tensor, Tensor],
        padding_T: Tensor | None = None,
        counted_TK: Tensor | None = None,
    ) -> "Report":
        """losses: this rank's parts of the balancing loss and the z-loss, without their coefficients."""
        served_T = keep_TK.any(1)
        tokens = torch.full((), len(keep_TK), device=keep_TK.device) if padding_T is None else (~padding_T).sum()
        load_E = router_stats.load_BE.sum(0)
        counts = [tokens, load_E.sum() - keep_TK.sum(), tokens - served_T.sum()]
        values = [router_stats.entropy, router_stats.logit_square, *losses]
        counted_E = load_E if counted_TK is None else count_loads(counted_TK, len(load_E))[0]
        return Report(load_E, torch.stack([value.double() for value in (*counts, *values)]), counted_E)


class LoadStatistics(nn.Module):
    """One sparse layer's running sums over this rank's tokens."""

    def __init__(self, num_experts: int):
        super().__init__()
        # float64: counts stay exact and sums of many steps keep their digits.
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.float64), persistent=False)
        self.register_buffer("sums", torch.zeros(len(SUMS), dtype=torch.float64), persistent=False)

    def forward(self, report: Report) -> None:
        """Adds a pass to the sums."""
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
    load_LE, sums = whole[:, :num_experts], dict(zip(SUMS, whole[:, num_experts:].T, strict=True))
    tokens = sums["tokens"].clip(min=1)
    return ExpertLoad(
        layers,
        load_LE,
        dropped_L=sums["dropped"] / load_LE.sum(1).clip(min=1),
        unserved_L=sums["unserved"] / tokens,
        entropy_L=sums["entropy"] / tokens,
        logit_rms_L=(sums["logit_square"] / tokens) ** 0.5,
        aux_loss_L=sums["aux_loss"] / micro_batches,
        z_loss_L=sums["z_loss"] / micro_batches,
    )
