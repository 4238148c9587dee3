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

import torch
from torch import Tensor

from conf.schema import MoeConfig
from moe.all_to_all import AllToAllDispatcher
from moe.deep_ep import DEEP_EP
from moe.dispatch_indices import Travelling, fill_slots, masked_experts, take_names
from ops.dispatch import Assignments, Dispatched, DispatcherFactory
from ops.operation import Implementation, Operation
from ops.permute import TORCH_PERMUTATION, Permutation, PermutedTokens, PermuteIndices, by_expert, by_expert_on_host
from ops.run_context import RunContext
from parallel.async_collectives import (
    async_all_gather,
    async_reduce_scatter,
    run_collective,
    start_collective,
    wait_collective,
)
from parallel.collectives import GatherSequence, all_gather
from parallel.process_groups import Groups


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
    if moe.overlap_degree > 1:
        return "all_to_all", "rows travel in parts"
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
