"""Brings rows to the ranks that hold their experts and back.

Three ways with one interface and one result: everything on this rank, all-to-all, all-gather. `start` sends, `finish`
waits: what is computed between the two runs while the rows travel. `combine` brings the experts' answers back.

With `slots`, the sizes are known beforehand: every expert gets exactly that many rows from every rank, zeros where it
was chosen less often, and the host waits for no count from the device. A micro-batch's capacity C bounds what all its
ranks together send to an expert, and a rank's T tokens what it alone can: the layer says slots = min(C, T).

Sums on a GPU (index_add, and index_select's gradient) add in any order; train.deterministic=true fixes it, through
torch.use_deterministic_algorithms.

Legend: T tokens of this rank, D hidden, E experts, L experts of this rank, K choices per token, R routed rows,
P ranks that rows come from, N = P * T tokens of these ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conf.schema import MoeConfig
from moe.deep_ep import DEEP_EP
from ops.dispatch import Assignments, Dispatched, DispatcherFactory
from ops.operation import Implementation, Operation
from ops.permute import TORCH_PERMUTATION, Permutation, PermutedTokens, PermuteIndices, by_expert, by_expert_on_host
from ops.run_context import RunContext
from parallel.async_collectives import (
    AsyncCollective,
    async_all_gather,
    async_all_to_all,
    async_reduce_scatter,
    run_collective,
    start_collective,
    wait_collective,
)
from parallel.collectives import GatherRagged, GatherSequence, ReduceScatterRagged, all_gather
from parallel.process_groups import Groups


def fill_slots(expert_X: Tensor, num_experts: int, slots: int) -> Tensor:
    """[E * slots]: which choice each slot holds, an expert's in order from its first slot on; X, which does not exist,
    where a slot is empty. Choices of expert E get no slot."""
    order, counts_E = by_expert(expert_X, num_experts)
    sorted_X = expert_X[order]
    first = F.pad(counts_E.cumsum(0), (1, 0))  # of each expert, and of expert E
    slot_X = sorted_X * slots + torch.arange(len(order), device=order.device) - first[sorted_X]
    slot_X = torch.where(sorted_X < num_experts, slot_X, num_experts * slots)
    choice = torch.full((num_experts * slots + 1,), len(order), device=order.device)
    return choice.scatter(0, slot_X, order)[:-1]


def take_names(names_TK: Tensor | None, choice_R: Tensor) -> Tensor | None:
    return None if names_TK is None else F.pad(names_TK.flatten(), (0, 1))[choice_R]


def masked_experts(assignments: Assignments, num_experts: int) -> Tensor:
    """[T * K]: the chosen experts, and E where the choice was dropped."""
    if assignments.keep_TK is None:
        return assignments.experts_TK.flatten()
    return torch.where(assignments.keep_TK, assignments.experts_TK, num_experts).flatten()


class LocalDispatcher:
    """Every expert is on this rank: rows are sorted, and nothing travels."""

    def __init__(self, num_experts: int, permutation: Permutation = TORCH_PERMUTATION):
        self.num_experts, self.permutation = num_experts, permutation

    def start(self, x_TD: Tensor, assignments: Assignments, slots: int | None = None) -> Dispatched:
        expert = masked_experts(assignments, self.num_experts)
        if slots is None:
            order, counts = by_expert_on_host(expert, self.num_experts)
            choice_R = order[: sum(counts)]
        else:
            counts, choice_R = [slots] * self.num_experts, fill_slots(expert, self.num_experts, slots)
        rows = PermutedTokens(
            x_TD, PermuteIndices(choice_R, assignments.experts_TK.shape[1], self.permutation), slots is not None
        )
        way_back = (choice_R, assignments.gates_TK, slots is not None)
        return Dispatched(rows, counts, take_names(assignments.names_TK, choice_R), way_back)

    def finish(self, started: Dispatched) -> Dispatched:
        return started

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        return self.permutation.unpermute(y_RD, *sent.way_back)


@dataclass(frozen=True)
class Travelling:
    """Rows on their way, and what is known of them beforehand."""

    handle: Tensor
    collective: AsyncCollective
    choice_R: Tensor
    """Which of the T * K choices each row was that left this rank; of the N * K for an all-gather."""
    assignments: Assignments
    padded: bool
    counts: list[int]


@dataclass(frozen=True)
class TravellingAlone(Travelling):
    """Rows on their way to their experts alone."""

    order_R: Tensor
    """The order that groups the arrived rows by expert."""
    send: list[int]
    receive: list[int]
    """Rows to and from each expert-parallel rank."""
    gathered: list[int]
    """Rows of each expert-tensor-parallel rank."""


class AllToAllDispatcher:
    """Every row travels to the rank that holds its expert and its answer back. With expert-tensor parallelism the ranks
    that each hold a slice of the same experts then gather their rows, and sum the answers."""

    def __init__(self, num_experts: int, groups: Groups, permutation: Permutation = TORCH_PERMUTATION):
        self.num_experts, self.permutation = num_experts, permutation
        self.ep, self.etp = groups.ep, groups.etp

    def start(self, x_TD: Tensor, assignments: Assignments, slots: int | None = None) -> TravellingAlone:
        expert, local = masked_experts(assignments, self.num_experts), self.num_experts // self.ep.size()
        sources = self.ep.size() * self.etp.size()
        if slots is None:
            order, counts_E = by_expert(expert, self.num_experts)
            send, receive, gathered, counts, arrived_PL = self._tell_counts(counts_E)
            choice_R = order[: sum(send)]
        else:
            choice_R = fill_slots(expert, self.num_experts, slots)
            send = receive = [local * slots] * self.ep.size()
            gathered, counts = [sources // self.etp.size() * local * slots] * self.etp.size(), [sources * slots] * local
            arrived_PL = torch.full((sources, local), slots, device=x_TD.device)
        expert_R = torch.arange(local, device=x_TD.device).repeat(sources)
        expert_R = expert_R.repeat_interleave(arrived_PL.flatten(), output_size=sum(counts))
        collective = async_all_to_all(send, receive, self.ep)
        handle = start_collective(
            self.permutation.permute(x_TD, choice_R, assignments.experts_TK.shape[1], slots is not None), collective
        )
        order_R = expert_R.argsort(stable=True)
        return TravellingAlone(
            handle, collective, choice_R, assignments, slots is not None, counts, order_R, send, receive, gathered
        )

    def _tell_counts(self, counts_E: Tensor) -> tuple[list[int], list[int], list[int], list[int], Tensor]:
        """What this rank sends each rank, receives from it, gathers from each rank of etp, has for each expert, and
        rows by where they come from and expert [P, L]. The host waits for the device once."""
        sent_PL = counts_E.view(self.ep.size(), -1)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL, group=self.ep)
        arrived_PL = all_gather(received_PL, self.etp)
        gathered = arrived_PL.view(self.etp.size(), -1).sum(1)
        parts = (sent_PL.sum(1), received_PL.sum(1), gathered, arrived_PL.sum(0))
        told = iter(torch.cat(parts).tolist())
        send, receive, gathered, counts = ([next(told) for _ in part] for part in parts)
        return send, receive, gathered, counts, arrived_PL

    def finish(self, started: TravellingAlone) -> Dispatched:
        rows = self._over_etp(wait_collective(started.handle, started.collective), started)
        names_R = take_names(started.assignments.names_TK, started.choice_R)
        if names_R is not None:
            names_R = run_collective(names_R, async_all_to_all(started.send, started.receive, self.ep))
            names_R = self._over_etp(names_R, started).index_select(0, started.order_R)
        return Dispatched(
            PermutedTokens(rows, PermuteIndices(started.order_R, 1, self.permutation)), started.counts, names_R, started
        )

    def _over_etp(self, rows: Tensor, started: TravellingAlone) -> Tensor:
        return GatherRagged.apply(rows, started.gathered, self.etp) if self.etp.size() > 1 else rows

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        way: TravellingAlone = sent.way_back
        arrived = torch.empty_like(way.order_R)
        arrived[way.order_R] = torch.arange(len(arrived), device=arrived.device)
        y_RD = y_RD.index_select(0, arrived)
        if self.etp.size() > 1:
            y_RD = ReduceScatterRagged.apply(y_RD, way.gathered, self.etp)
        y_RD = run_collective(y_RD, async_all_to_all(way.receive, way.send, self.ep))
        return self.permutation.unpermute(y_RD, way.choice_R, way.assignments.gates_TK, way.padded)


class AllGatherDispatcher:
    """Every rank gets all tokens of the ranks that share the experts, computes what its experts were chosen for, and
    the partial sums are added up on the tokens' ranks. Moves N tokens instead of T * K rows, and so less where top_k
    exceeds the ranks, and needs no counts of other ranks."""

    def __init__(self, num_experts: int, groups: Groups, permutation: Permutation = TORCH_PERMUTATION):
        self.num_experts, self.permutation = num_experts, permutation
        self.ep, self.etp = groups.ep, groups.etp

    def start(self, x_TD: Tensor, assignments: Assignments, slots: int | None = None) -> Travelling:
        local, sources = self.num_experts // self.ep.size(), self.ep.size() * self.etp.size()
        collective = async_all_gather(self.ep)
        handle = start_collective(self._over_etp(x_TD), collective)
        expert = self._all(masked_experts(assignments, self.num_experts)) - local * self.ep.rank()
        expert = torch.where((expert >= 0) & (expert < local), expert, local)
        if slots is None:
            order, counts_L = by_expert(expert, local)
            counts = counts_L.tolist()
            choice_R = order[: sum(counts)]
        else:
            # An expert's slots are dealt out by the rank that the rows come from.
            source = torch.arange(sources, device=x_TD.device).repeat_interleave(len(expert) // sources)
            apart = torch.where(expert < local, expert * sources + source, local * sources)
            counts, choice_R = [sources * slots] * local, fill_slots(apart, local * sources, slots)
        return Travelling(handle, collective, choice_R, assignments, slots is not None, counts)

    def _over_etp(self, t: Tensor) -> Tensor:
        return GatherSequence.apply(t, self.etp) if self.etp.size() > 1 else t

    def _all(self, t: Tensor) -> Tensor:
        return all_gather(all_gather(t, self.etp), self.ep)

    def finish(self, started: Travelling) -> Dispatched:
        x_ND, names_TK = wait_collective(started.handle, started.collective), started.assignments.names_TK
        rows = PermutedTokens(
            x_ND,
            PermuteIndices(started.choice_R, started.assignments.experts_TK.shape[1], self.permutation),
            started.padded,
        )
        names_R = take_names(None if names_TK is None else self._all(names_TK), started.choice_R)
        return Dispatched(rows, started.counts, names_R, started)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        way: Travelling = sent.way_back
        gates_NK = run_collective(self._over_etp(way.assignments.gates_TK), async_all_gather(self.ep))
        out = run_collective(
            self.permutation.unpermute(y_RD, way.choice_R, gates_NK, way.padded), async_reduce_scatter(self.ep)
        )
        return run_collective(out, async_reduce_scatter(self.etp)) if self.etp.size() > 1 else out


DISPATCHERS: dict[str, DispatcherFactory] = {
    "local": lambda num_experts, hidden_size, groups, permutation: LocalDispatcher(num_experts, permutation),
    "all_to_all": lambda num_experts, hidden_size, groups, permutation: AllToAllDispatcher(
        num_experts, groups, permutation
    ),
    "all_gather": lambda num_experts, hidden_size, groups, permutation: AllGatherDispatcher(
        num_experts, groups, permutation
    ),
}


def dispatcher_for(moe: MoeConfig, ep: int, etp: int) -> tuple[str, str]:
    """(dispatcher, why) for model.moe.dispatcher, without optional packages."""
    if ep == etp == 1:
        return "local", "every expert is on every rank"
    if moe.dispatcher in ("all_to_all", "all_gather"):
        return moe.dispatcher, "asked for"
    if moe.gate_on == "input":
        return "all_to_all", "tokens are multiplied by their gates before they travel"
    if moe.load_balancing == "expert_choice":
        return "all_to_all", "how many experts take a token differs between ranks"
    if moe.top_k > ep > 1:
        return "all_gather", f"{ep} ranks share the experts and a token visits {moe.top_k}"
    return "all_to_all", "rows travel to their experts alone"


def _reference(context: RunContext) -> Implementation[DispatcherFactory]:
    name, why = dispatcher_for(context.model.moe, context.groups.ep.size(), context.groups.etp.size())
    return Implementation(name, lambda context: DISPATCHERS[name], why)


def _trial(make: DispatcherFactory, context: RunContext) -> list[Tensor]:
    """Random tokens, some of their choices dropped, with experts that multiply by 1, 2, 3, ..."""
    moe, groups, device, tokens = context.model.moe, context.groups, context.device, 64
    generator = torch.Generator().manual_seed(groups.ep.rank())
    x_TD = torch.randn(tokens, context.model.hidden_size, generator=generator).to(device, context.dtype)
    experts_TK = torch.rand(tokens, moe.num_experts, generator=generator).argsort(1)[:, : moe.top_k].to(device)
    gates_TK = torch.rand(tokens, moe.top_k, generator=generator).to(device).requires_grad_()
    keep_TK = (torch.rand(tokens, moe.top_k, generator=generator) < 0.9).to(device)
    x_TD.requires_grad_()
    dispatcher = make(moe.num_experts, context.model.hidden_size, groups, TORCH_PERMUTATION)
    sent = dispatcher.finish(dispatcher.start(x_TD, Assignments(experts_TK, gates_TK, keep_TK)))
    local = moe.num_experts // groups.ep.size()
    factors = torch.arange(local, device=device) + 1 + local * groups.ep.rank()
    per_row = factors.repeat_interleave(torch.tensor(sent.counts, device=device))
    rows_RD = sent.rows.permute()
    out = dispatcher.combine(rows_RD * per_row[:, None].to(rows_RD.dtype), sent)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (x_TD, gates_TK))]


DISPATCH = Operation(
    field="dispatcher",
    name="dispatch",
    reference=_reference,
    implementations=[DEEP_EP],
    trial=_trial,
    # Sums in bf16, in another order.
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    is_used=lambda context: bool(context.model.moe.num_experts),
    setting="model.moe.dispatcher",
    refusal="model.moe.dispatcher={name}: {note}. Use model.moe.dispatcher=auto",
    is_collective=True,
    standard="",
)
