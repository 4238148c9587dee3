"""All-to-all dispatch: rows travel to the ranks of their experts at once or in parts.

Legend: T tokens of this rank, D hidden, E experts, L experts of this rank, or of a part of them, K choices per token,
R routed rows, P ranks that rows come from.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe.dispatch_indices import Travelling, fill_slots, masked_experts, take_names
from ops.dispatch import Assignments, Dispatched
from ops.permute import TORCH_PERMUTATION, Permutation, PermutedTokens, PermuteIndices, by_expert
from parallel.async_collectives import (
    AsyncCollective,
    JoinedRows,
    JoinRows,
    SplitRows,
    async_all_to_all,
    start_collective,
    wait_collective,
)
from parallel.collectives import GatherRagged, ReduceScatterRagged, all_gather
from parallel.process_groups import Groups


@dataclass(frozen=True)
class Sizes:
    """Rows of one part of the experts."""

    send: list[int]
    receive: list[int]
    """To and from each expert-parallel rank."""
    gathered: list[int]
    """Of each expert-tensor-parallel rank."""
    counts: list[int]
    """For each of this rank's experts."""
    arrived_PL: Tensor
    """The same, by the rank that they come from."""


@dataclass(frozen=True)
class Parts:
    """The rows of all parts."""

    gradients: JoinedRows
    answers: JoinedRows
    choice_R: Tensor


@dataclass(frozen=True)
class TravellingAlone(Travelling):
    """Rows on their way to their experts alone."""

    sizes: Sizes
    order_R: Tensor
    """The order that groups the arrived rows by expert."""
    names: tuple[Tensor, AsyncCollective] | None
    """Names of the rows, on their way too."""
    part: tuple[Parts, int] | None
    """All rows, where these are some of them, and which."""


@dataclass(frozen=True)
class Returning:
    """Answers on their way back."""

    handle: Tensor
    collective: AsyncCollective
    way: TravellingAlone


class AllToAllDispatcher:
    """Every row travels to the rank that holds its expert and its answer back. With expert-tensor parallelism the ranks
    that each hold a slice of the same experts then gather their rows, and sum the answers.

    Rows can travel in parts, each to an equal number of neighbouring experts of every rank: one part arrives while the
    experts of another compute. An expert's rows are the same as without parts, and in the same order."""

    def __init__(self, num_experts: int, groups: Groups, permutation: Permutation = TORCH_PERMUTATION):
        self.num_experts, self.permutation = num_experts, permutation
        self.ep, self.etp = groups.ep, groups.etp

    def start(self, x_TD: Tensor, assignments: Assignments, slots: int | None = None) -> TravellingAlone:
        (part,) = self.start_parts(x_TD, assignments, slots, 1)
        return part

    def start_parts(
        self, x_TD: Tensor, assignments: Assignments, slots: int | None, parts: int
    ) -> list[TravellingAlone]:
        """Sends the rows in parts; as Dispatcher.start. Each part is then finished and sent back, and all of them are
        joined."""
        top_k, padded = assignments.experts_TK.shape[1], slots is not None
        place = self._place(masked_experts(assignments, self.num_experts), parts)
        if slots is None:
            order, counts_E = by_expert(place, self.num_experts)
            sizes = self._tell_counts(counts_E, parts)
            choice_R = order[: sum(sum(part.send) for part in sizes)]
        else:
            choice_R = fill_slots(place, self.num_experts, slots)
            sizes = [self._padded_sizes(slots, parts, x_TD.device)] * parts
        rows_RD = self.permutation.permute(x_TD, choice_R, top_k, padded)
        names_R = take_names(assignments.names_TK, choice_R)
        if parts == 1:
            return [self._start_part(sizes[0], rows_RD, choice_R, names_R, assignments, padded)]
        lengths = [sum(part.send) for part in sizes]
        whole = Parts(JoinedRows(lengths), JoinedRows(lengths), choice_R)
        rows, choices = SplitRows.apply(rows_RD, whole.gradients), choice_R.split(lengths)
        names = [None] * parts if names_R is None else names_R.split(lengths)
        return [
            self._start_part(sizes[p], rows[p], choices[p], names[p], assignments, padded, (whole, p))
            for p in range(parts)
        ]

    def _start_part(
        self,
        sizes: Sizes,
        rows_RD: Tensor,
        choice_R: Tensor,
        names_R: Tensor | None,
        assignments: Assignments,
        padded: bool,
        part: tuple[Parts, int] | None = None,
    ) -> TravellingAlone:
        names = None
        if names_R is not None:
            collective = async_all_to_all(sizes.send, sizes.receive, self.ep)
            names = (start_collective(names_R, collective), collective)
        collective = async_all_to_all(
            sizes.send, sizes.receive, self.ep, gradient=part and part[0].gradients.output(part[1])
        )
        handle = start_collective(rows_RD, collective)
        sources, local = sizes.arrived_PL.shape
        expert_R = torch.arange(local, device=choice_R.device).repeat(sources)
        expert_R = expert_R.repeat_interleave(sizes.arrived_PL.flatten(), output_size=sum(sizes.counts))
        order_R = expert_R.argsort(stable=True)
        return TravellingAlone(
            handle, collective, choice_R, assignments, padded, sizes.counts, sizes, order_R, names, part
        )

    def _place(self, expert: Tensor, parts: int) -> Tensor:
        """Where an expert's rows lie among all: by part, rank and expert. E stays E."""
        if parts == 1:
            return expert
        place_E = torch.arange(self.num_experts, device=expert.device).view(parts, self.ep.size(), -1)
        return F.pad(place_E.transpose(0, 1).flatten(), (0, 1), value=self.num_experts)[expert]

    def _padded_sizes(self, slots: int, parts: int, device: torch.device) -> Sizes:
        local, sources = self.num_experts // self.ep.size() // parts, self.ep.size() * self.etp.size()
        send = [local * slots] * self.ep.size()
        arrived_PL = torch.full((sources, local), slots, device=device)
        gathered = [self.ep.size() * local * slots] * self.etp.size()
        return Sizes(send, send, gathered, [sources * slots] * local, arrived_PL)

    def _tell_counts(self, counts_E: Tensor, parts: int) -> list[Sizes]:
        """The sizes of each part, from this rank's rows by part, rank and expert. The host waits for the device
        once."""
        sent_PL = counts_E.view(parts, self.ep.size(), -1).transpose(0, 1).flatten(1).contiguous()
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL, group=self.ep)
        arrived_PL = all_gather(received_PL, self.etp)
        sent, received, arrived = (t.unflatten(1, (parts, -1)) for t in (sent_PL, received_PL, arrived_PL))
        gathered = arrived.unflatten(0, (self.etp.size(), -1)).sum((1, 3))
        # [rank or expert, part] each.
        figures = (sent.sum(2), received.sum(2), gathered, arrived.sum(0).t())
        told = iter(torch.cat([figure.t().flatten() for figure in figures]).tolist())
        send, receive, gathered, counts = ([[next(told) for _ in range(len(f))] for _ in range(parts)] for f in figures)
        each = zip(send, receive, gathered, counts, arrived.unbind(1), strict=True)
        return [Sizes(*part) for part in each]

    def finish(self, started: TravellingAlone) -> Dispatched:
        rows = self._over_etp(wait_collective(started.handle, started.collective), started)
        names_R = None
        if started.names is not None:
            names_R = self._over_etp(wait_collective(*started.names), started).index_select(0, started.order_R)
        return Dispatched(
            PermutedTokens(rows, PermuteIndices(started.order_R, 1, self.permutation)), started.counts, names_R, started
        )

    def _over_etp(self, rows: Tensor, started: TravellingAlone) -> Tensor:
        return GatherRagged.apply(rows, started.sizes.gathered, self.etp) if self.etp.size() > 1 else rows

    def send_back(self, y_RD: Tensor, sent: Dispatched) -> Returning:
        """Sends the answers of a part back."""
        way: TravellingAlone = sent.way_back
        arrived = torch.empty_like(way.order_R)
        arrived[way.order_R] = torch.arange(len(arrived), device=arrived.device)
        y_RD = y_RD.index_select(0, arrived)
        if self.etp.size() > 1:
            y_RD = ReduceScatterRagged.apply(y_RD, way.sizes.gathered, self.etp)
        output = way.part and way.part[0].answers.output(way.part[1])
        collective = async_all_to_all(way.sizes.receive, way.sizes.send, self.ep, output)
        return Returning(start_collective(y_RD, collective), collective, way)

    def join(self, returning: list[Returning]) -> Tensor:
        """Waits for the answers of all parts; as Dispatcher.combine."""
        answers, way = [wait_collective(part.handle, part.collective) for part in returning], returning[0].way
        y_RD, choice_R = answers[0], way.choice_R
        if way.part is not None:
            whole, _ = way.part
            y_RD, choice_R = JoinRows.apply(whole.answers, *answers), whole.choice_R
        return self.permutation.unpermute(y_RD, choice_R, way.assignments.gates_TK, way.padded)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        return self.join([self.send_back(y_RD, sent)])
