"""The router's metrics (moe/router_metrics.py) on their way: reduced on the device, read once per logged step.

Legend: T tokens of this rank, E experts, K assignments per token, L sparse layers, N metrics.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.expert_load import ExpertLoad
from moe.router_metrics import ROUTER_METRICS, RouterMetric, RouterPass
from ops.routing import count_loads
from parallel.layout import Layout


def _computed(*, by_max: bool) -> list[RouterMetric]:
    """The metrics that layers compute: those of which the largest value is taken, or those that are added up."""
    return [m for m in ROUTER_METRICS.values() if m.compute is not None and (m.reduction == "max") == by_max]


@dataclass(frozen=True)
class Report:
    """What one pass through a sparse layer counted over this rank's tokens. Returned by the layer and added up by its
    caller, so that a pass which is computed twice is counted once."""

    load_E: Tensor
    """Assignments of each expert."""
    sums: Tensor
    """float64: the tokens, then the sum of each metric that is added up."""
    maxima: Tensor
    """float64, of the metrics that are reduced by max."""
    counted_E: Tensor
    """What the balancing loss counts for each expert: its assignments, or the best of the scores
    (Routing.counted_TK)."""
    chosen: tuple[Tensor, Tensor, Tensor] | None = None
    """For router replay: of this rank's tokens experts, gates and whether the assignment was kept, [S, B, K] each;
    None: nothing records them."""

    @staticmethod
    @torch.no_grad()
    def of(layer: RouterPass) -> "Report":
        keep_TK, padding_T, counted_TK = layer.keep_TK, layer.padding_T, layer.routing.counted_TK
        tokens = torch.full((), len(keep_TK), device=keep_TK.device) if padding_T is None else (~padding_T).sum()
        sums = [tokens.double(), *(_over_tokens(m, layer) for m in _computed(by_max=False))]
        maxima = [_over_tokens(m, layer) for m in _computed(by_max=True)]
        load_E = layer.stats.load_BE.sum(0)
        counted_E = load_E if counted_TK is None else count_loads(counted_TK, len(load_E))[0]
        return Report(load_E, torch.stack(sums), torch.stack(maxima) if maxima else sums[0].new_empty(0), counted_E)


def _over_tokens(metric: RouterMetric, layer: RouterPass) -> Tensor:
    """A scalar in float64."""
    assert metric.compute is not None
    value, by_max = metric.compute(layer).double(), metric.reduction == "max"
    if not value.dim():
        return value
    if value.shape != layer.keep_TK.shape[:1]:
        raise ValueError(f"router metric {metric.name} is {list(value.shape)}; give a value of each token, or a scalar")
    nothing = float("-inf") if by_max else 0.0
    if layer.padding_T is not None:
        value = value.masked_fill(layer.padding_T, nothing)
    return value.sum() if not by_max else value.max() if len(value) else value.new_full((), nothing)


class LoadStatistics(nn.Module):
    """One sparse layer's running sums over this rank's tokens."""

    load_E: Tensor
    sums: Tensor
    maxima: Tensor

    def __init__(self, num_experts: int):
        super().__init__()
        # float64: counts stay exact and sums of many steps keep their digits.
        empty_E, sums = torch.zeros(num_experts, dtype=torch.float64), 1 + len(_computed(by_max=False))
        self.register_buffer("load_E", empty_E, persistent=False)
        self.register_buffer("sums", empty_E.new_zeros(sums), persistent=False)
        self.register_buffer("maxima", empty_E.new_zeros(len(_computed(by_max=True))), persistent=False)
        self.reset()

    def forward(self, report: Report) -> None:
        """Adds a pass to the sums."""
        self.load_E += report.load_E
        self.sums += report.sums
        torch.maximum(self.maxima, report.maxima, out=self.maxima)

    def reset(self) -> None:
        self.load_E.zero_()
        self.sums.zero_()
        self.maxima.fill_(float("-inf"))

    def sum_of(self, name: str) -> float:
        """Of "tokens", or of a metric that is added up: over this rank's passes since the last reset."""
        return self.sums[["tokens", *(m.name for m in _computed(by_max=False))].index(name)].item()


def collect(
    parts: dict[int, LoadStatistics],
    layers: list[int],
    num_experts: int,
    layout: Layout,
    micro_batches: int,
    device: torch.device,
) -> ExpertLoad | None:
    """`local_sums` and `reduced_load` with an all-reduce in between. None for a dense model."""
    if not layers:
        return None
    table, largest = local_sums(parts, layers, num_experts, device)
    dist.all_reduce(table)
    return reduced_load(table, largest, layers, num_experts, layout, micro_batches)


def local_sums(
    parts: dict[int, LoadStatistics], layers: list[int], num_experts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """This rank's statistics; starts a new interval.

    Args:
        parts: this rank's sparse layers.
        layers: all sparse layers of the model, over all pipeline stages.

    Returns:
        What is summed over all ranks, fp64 [L, E + 1 + N]: loads, tokens and the metrics that are added up; and what
        `reduced_load` takes the maximum of, [L, M].
    """
    summed, by_max = _computed(by_max=False), _computed(by_max=True)
    table = torch.zeros(len(layers), num_experts + 1 + len(summed), dtype=torch.float64, device=device)
    largest = torch.full((len(layers), len(by_max)), float("-inf"), dtype=torch.float64, device=device)
    for index, layer in enumerate(layers):
        if layer in parts:
            table[index] = torch.cat([parts[layer].load_E, parts[layer].sums])
            largest[index] = parts[layer].maxima
            parts[layer].reset()
    return table, largest


def reduced_load(
    table: Tensor, largest: Tensor, layers: list[int], num_experts: int, layout: Layout, micro_batches: int
) -> ExpertLoad:
    """The load over all ranks. Every rank calls this together: metrics with reduction="max", of which there are none
    unless an extension adds one, take an all-reduce of their own.

    Args:
        table: `local_sums` of all ranks added up.
        largest: this rank's maxima.
        micro_batches: global micro-batches of the interval.
    """
    summed, by_max = _computed(by_max=False), _computed(by_max=True)
    if by_max:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    # Without sequence parallelism all tensor-parallel ranks route the same tokens.
    whole = table.cpu().numpy() / (1 if layout.sequence_parallel else layout.tp)
    load_LE, (token_L, *sum_NL) = whole[:, :num_experts], whole[:, num_experts:].T
    over = {"tokens": token_L.clip(min=1), "assignments": load_LE.sum(1).clip(min=1), "micro_batches": micro_batches}
    reduced = dict(zip((metric.name for metric in by_max), largest.cpu().numpy().T, strict=True))
    for metric, sum_L in zip(summed, sum_NL, strict=True):
        reduced[metric.name] = sum_L / over[metric.mean_over] if metric.reduction == "mean" else sum_L
    for metric in (*summed, *by_max):
        if metric.transform is not None:
            reduced[metric.name] = metric.transform(reduced[metric.name])
    return ExpertLoad(layers, load_LE, reduced)
