"""The sparse layer: router -> dispatch -> experts -> combine, and the shared experts while rows travel.

Legend: S sequence (this rank's slice), B batch, D hidden, T = S * B tokens of this rank in sequence order, M tokens of
the micro-batch (all ranks that share it), K choices per token.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor, nn

from conf.schema import ModelConfig
from moe.all_to_all import AllToAllDispatcher, Returning
from moe.aux_loss import AttachLoss, load_balancing_loss
from moe.balanced_routing import tie_ranks
from moe.capacity import capacity, within_capacity
from moe.counter_rng import key, uniform
from moe.dispatcher import DISPATCHERS, dispatcher_for
from moe.expert_dropout import Dropout, name_choices
from moe.expert_parts import ExpertWeights
from moe.experts import Experts
from moe.metrics import LoadStatistics, Report
from moe.router import Router
from moe.router_metrics import RouterPass
from moe.shared_experts import SharedExperts
from ops.dispatch import Assignments, Dispatched, with_gated_inputs
from ops.implementations import Ops
from ops.routing import Choice, Routing, count_loads
from parallel.activation_checkpoint import checkpointed, save_for_recompute
from parallel.batch_context import DEFAULT_CONTEXT, EVALUATE, GENERATE, TRAIN, BatchContext
from parallel.collectives import all_gather
from parallel.process_groups import Groups


class MoELayer(nn.Module):
    """A Switch layer (Fedus et al. 2021, arXiv:2101.03961, section 2). Tokens whose choices are all dropped come out
    as zero: the residual around the layer passes them on."""

    step_load_2E: Tensor

    def __init__(
        self,
        model: ModelConfig,
        *,
        ops: Ops,
        dtype: torch.dtype,
        sequence_parallel: bool,
        groups: Groups,
        draws: tuple[int, int],
        shared: SharedExperts | None = None,
    ):
        """Args:
        draws: (seed of the run, layer), which name this layer's random numbers (moe.counter_rng).
        """
        super().__init__()
        self.moe, self.tp, self.draws = model.moe, groups.tp, draws
        layers, layer = model.sparse_layers, draws[1]
        self.replay_index = layers.index(layer) if layer in layers else None
        """Of this layer in a recorded routing; None: it is not part of one (multi-token prediction)."""
        self.recompute = "moe" in model.recompute
        # Without sequence parallelism all tensor-parallel ranks hold the same tokens: each sends its share of them.
        self.share_tokens = groups.tp.size() > 1 and not sequence_parallel
        self.sequence_parallel = sequence_parallel
        self.router = Router(model, sequence_parallel=sequence_parallel, groups=groups, ops=ops)
        self.micro_batch_group = self.router.micro_batch_group
        by_rule, _ = dispatcher_for(model.moe, groups.ep.size(), groups.etp.size())
        make = ops.dispatcher or DISPATCHERS[by_rule]
        self.dispatcher = make(model.moe.num_experts, model.hidden_size, groups, ops.permutation)
        self.parts = model.moe.overlap_degree
        self.shared = shared
        self.experts = Experts(model, backend=ops.experts, dtype=dtype, groups=groups)
        self.statistics = LoadStatistics(model.moe.num_experts)
        # float64: exact sums, so that every layout sees the same load.
        step_load_2E = torch.zeros(2, model.moe.num_experts, dtype=torch.float64)
        self.register_buffer("step_load_2E", step_load_2E, persistent=False)
        """Of the optimizer step under way: choices of each expert, and what the balancing loss counts."""

    def forward(self, x_SBD: Tensor, batch_ctx: BatchContext = DEFAULT_CONTEXT) -> tuple[Tensor, Report | None]:
        """The output [S, B, D], and what was counted. The caller passes the latter to `record` once: under activation
        recompute this runs twice. With a cache nothing is counted: None."""
        if batch_ctx.cache is not None:
            return self._generate(x_SBD, batch_ctx), None
        return checkpointed(self._run, x_SBD, batch_ctx) if self.recompute else self._run(x_SBD, batch_ctx)

    def record(self, report: Report, batch_ctx: BatchContext) -> None:
        """Adds up what a training pass counted, and passes on what the router chose if that is recorded."""
        if report.chosen is not None and batch_ctx.recorder is not None:
            batch_ctx.recorder.record(batch_ctx.micro_batch, self.draws[1], *report.chosen)
        if batch_ctx.mode == TRAIN:
            self.statistics(report)
            if self.router.follows_load:
                self.step_load_2E += torch.stack([report.load_E, report.counted_E])

    def _run(self, x_SBD: Tensor, batch_ctx: BatchContext) -> tuple[Tensor, Report]:
        padding_T = self._padding(batch_ctx)
        rows = x_SBD.shape[1] if self.moe.load_balancing == "seq_aux_loss" else 1
        tokens_TD, replayed_TK = self._jittered(x_SBD.flatten(0, 1), batch_ctx), self._replayed(batch_ctx.routing_BSLK)
        replayed_TK = None if replayed_TK is None else replayed_TK.long()
        routing = self.router(tokens_TD, padding_T, batch_ctx.mode, rows, replayed_TK)
        keep_TK, loss, report = self._balance(routing, padding_T, batch_ctx, x_SBD.shape[1])
        if batch_ctx.recorder is not None and self.replay_index is not None:
            chosen = routing.experts_TK, routing.gates_TK.detach(), keep_TK
            experts_SBK, gates_SBK, kept_SBK = (x_TK.unflatten(0, x_SBD.shape[:2]) for x_TK in chosen)
            report = replace(report, chosen=(experts_SBK, gates_SBK, kept_SBK))
        out_SBD = self._experts(x_SBD, routing, keep_TK, batch_ctx)
        return AttachLoss.apply(out_SBD, loss, batch_ctx.loss_scale) if torch.is_grad_enabled() else out_SBD, report

    def _generate(self, x_SBD: Tensor, batch_ctx: BatchContext) -> Tensor:
        """The output for tokens that follow those in a cache: dropless, without losses and metrics. Every token decides
        by itself, so that ranks ask each other nothing."""
        x_TD, padding_T = x_SBD.flatten(0, 1), self._padding(batch_ctx)
        choice = self.router.choose(x_TD, padding_T, batch_ctx.mode)
        if batch_ctx.routing is not None:
            batch_ctx.routing[self.draws[1]] = choice.experts_TK, choice.gates_TK
        tokens = len(x_TD)
        if self.share_tokens and (short := -tokens % self.tp.size()):  # they are shared out by the token
            x_TD, gates_TK = (F.pad(t, (0, 0, 0, short)) for t in (x_TD, choice.gates_TK))
            choice = Choice(gates_TK, F.pad(choice.experts_TK, (0, 0, 0, short), value=self.moe.num_experts))
        out_T1D = self._experts(x_TD.unsqueeze(1), choice, None, batch_ctx)
        return out_T1D[:tokens].view(x_SBD.shape)

    def _padding(self, batch_ctx: BatchContext) -> Tensor | None:
        """bool [T]: True where there is no token; None: there is one everywhere."""
        if batch_ctx.padding_BS is None:
            return None
        return self._tokens_of(batch_ctx.padding_BS)

    def _replayed(self, recorded_BSLK: Tensor | None) -> Tensor | None:
        """[T, K]: what is recorded of this layer's assignments; None: nothing is."""
        if recorded_BSLK is None or self.replay_index is None:
            return None
        return self._tokens_of(recorded_BSLK[:, :, self.replay_index])

    def _tokens_of(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] of this rank's shard over cp, as it holds the tokens: [T, ...]."""
        x_SB = x_BS.transpose(0, 1)
        return (x_SB.chunk(self.tp.size())[self.tp.rank()] if self.sequence_parallel else x_SB).flatten(0, 1)

    def _jittered(self, x_TD: Tensor, batch_ctx: BatchContext) -> Tensor:
        """What the router sees: while training, every value times a factor of its own between 1 - jitter and
        1 + jitter (Switch, section 2.4 and appendix C)."""
        if not self.moe.jitter or batch_ctx.mode != TRAIN:
            return x_TD
        first = self.micro_batch_group.rank() * len(x_TD)
        rows_T = torch.arange(first, first + len(x_TD), device=x_TD.device)
        noise_TD = uniform(self._key("jitter", batch_ctx), rows_T, x_TD.shape[1])
        return x_TD.float() * noise_TD.mul_(2 * self.moe.jitter).add_(1 - self.moe.jitter)

    def _key(self, purpose: str, batch_ctx: BatchContext) -> int:
        seed, layer = self.draws
        return key(seed, purpose, batch_ctx.step, batch_ctx.micro_batch, layer)

    def _balance(
        self, routing: Routing, padding_T: Tensor | None, batch_ctx: BatchContext, sequences: int
    ) -> tuple[Tensor, Tensor, Report]:
        """(keep_TK, this rank's part of the weighted auxiliary losses, what to record). Capacity and load are those of
        the whole micro-batch, so all its ranks gather the choices and decide alike."""
        moe, group = self.moe, self.micro_batch_group
        experts_MK = all_gather(routing.experts_TK, group)
        padding_M = None if padding_T is None else all_gather(padding_T, group)
        keep_TK = self._replayed(batch_ctx.routing_kept_BSLK)
        if keep_TK is None:
            keep_MK = self._fit(routing, experts_MK, padding_M, batch_ctx, sequences)
            keep_TK = keep_MK.narrow(0, group.rank() * len(routing.experts_TK), len(routing.experts_TK))
        else:
            keep_TK = keep_TK & (routing.experts_TK < moe.num_experts)
        keep_TK = save_for_recompute(keep_TK)
        aux = self._balancing_loss(routing, experts_MK, padding_M)
        tokens = max(1, len(experts_MK)) if padding_M is None else (~padding_M).sum().clamp(min=1)
        z = routing.router_stats.z / tokens  # of mean_t logsumexp(logits_t)^2 (ST-MoE, arXiv:2202.08906, eq. 5)
        report = Report.of(RouterPass(routing, keep_TK, aux, z, padding_T))
        # A choice that is balanced by itself leaves such a loss nothing to do.
        coeff = 0.0 if moe.load_balancing in ("sinkhorn", "expert_choice") else moe.aux_loss_coeff
        return keep_TK, coeff * aux + moe.z_loss_coeff * z, report

    def _fit(
        self, routing: Routing, experts_MK: Tensor, padding_M: Tensor | None, batch_ctx: BatchContext, sequences: int
    ) -> Tensor:
        """bool [M, K]: the choices that are there and find room."""
        moe, factor = self.moe, self._capacity_factor(batch_ctx)
        alone = sequences if moe.capacity_per == "sequence" else 1
        if factor is None or self.router.experts_choose:
            return experts_MK < moe.num_experts
        priority_MK = None
        if moe.drop_policy == "probability":
            gates_MK = all_gather(routing.gates_TK.detach(), self.micro_batch_group)
            sequence_M = torch.arange(len(experts_MK), device=experts_MK.device) % alone
            bins_MK = experts_MK + (moe.num_experts + 1) * sequence_M[:, None]
            priority_MK = -tie_ranks(gates_MK.view(1, -1), bins_MK.view(1, -1)).view_as(experts_MK)
        elif moe.drop_policy == "random":
            rows_M = torch.arange(len(experts_MK), device=experts_MK.device)
            priority_MK = uniform(self._key("drop", batch_ctx), rows_M, moe.top_k)
        if padding_M is None:
            tokens = [len(experts_MK) // alone] * alone
        else:
            tokens = (~padding_M).unflatten(0, (len(padding_M) // alone, alone)).sum(0).tolist()
        limits = [capacity(n, moe.top_k, moe.num_experts, factor) for n in tokens]
        limit = limits[0] if alone == 1 else torch.tensor(limits).to(experts_MK.device, non_blocking=True)
        return within_capacity(experts_MK, moe.num_experts, limit, priority_MK, alone)

    def _balancing_loss(self, routing: Routing, experts_MK: Tensor, padding_M: Tensor | None) -> Tensor:
        """This rank's part, without its coefficient."""
        load_BE = routing.router_stats.load_BE
        rows = len(load_BE)
        if routing.counted_TK is not None and self.router.last_load is None:
            experts_MK = all_gather(routing.counted_TK, self.micro_batch_group)
            load_BE = count_loads(experts_MK, self.moe.num_experts, rows)
        if padding_M is None:
            tokens_B = torch.full((rows,), len(experts_MK) // rows, device=experts_MK.device)
        else:
            tokens_B = (~padding_M).unflatten(0, (len(padding_M) // rows, rows)).sum(0)
        if self.router.last_load is not None:
            load_BE = self.router.last_load[None]
        elif routing.counted_TK is None and self.micro_batch_group.size() > 1:
            load_BE = count_loads(experts_MK, self.moe.num_experts, rows)
        return load_balancing_loss(routing.router_stats.probs_BE, load_BE, tokens_B)

    def _capacity_factor(self, batch_ctx: BatchContext) -> float | None:
        """None: dropless."""
        moe = self.moe
        if self.router.experts_choose:
            return moe.capacity_factor
        return {TRAIN: moe.capacity_factor, EVALUATE: moe.eval_capacity_factor, GENERATE: None}[batch_ctx.mode]

    def _slots(self, routing: Choice, batch_ctx: BatchContext, sequences: int) -> int | None:
        """Rows that every expert gets from this rank where they are padded to the capacity, else None. A replay may
        keep more than the capacity."""
        factor = self._capacity_factor(batch_ctx)
        if factor is None or not self.moe.pad_to_capacity or batch_ctx.routing_kept_BSLK is not None:
            return None
        tokens = routing.experts_TK.shape[0]
        alone = sequences if self.moe.capacity_per == "sequence" else 1
        whole = tokens * self.micro_batch_group.size() // alone
        limit = alone * capacity(whole, self.moe.top_k, self.moe.num_experts, factor)
        return min(limit, tokens // self.tp.size() if self.share_tokens else tokens)

    def _names(self, routing: Choice, batch_ctx: BatchContext) -> Tensor | None:
        """[T, K] names of the choices where noise belongs to them, else None."""
        adapters = self.experts.lora is not None and self.experts.lora.dropout > 0
        if not (self.moe.expert_dropout or adapters) or batch_ctx.mode != TRAIN:
            return None
        group = self.micro_batch_group
        place = {"part": group.rank(), "parts": group.size(), "micro_batch": batch_ctx.micro_batch}
        return name_choices(routing.experts_TK, self.moe.num_experts, **place)

    def _dropout(self, names_R: Tensor | None, batch_ctx: BatchContext) -> Dropout | None:
        if names_R is None or not self.moe.expert_dropout:
            return None
        seed, layer = self.draws
        named = key(seed, "expert dropout", batch_ctx.step, layer)
        return Dropout(self.moe.expert_dropout, named, names_R, self.experts.ffn_hidden_size)

    def _experts(self, x_SBD: Tensor, routing: Choice, keep_TK: Tensor | None, batch_ctx: BatchContext) -> Tensor:
        """keep_TK: None: nothing is dropped."""
        gates_TK, experts_TK, mine_SBD = routing.gates_TK, routing.experts_TK, x_SBD
        names_TK = self._names(routing, batch_ctx)
        if self.share_tokens:
            mine_SBD = scatter_to_sequence_parallel_region(x_SBD, group=self.tp)
            gates_TK = scatter_to_sequence_parallel_region(gates_TK, group=self.tp)
            rank, ranks = self.tp.rank(), self.tp.size()
            experts_TK = experts_TK.chunk(ranks)[rank]
            keep_TK = None if keep_TK is None else keep_TK.chunk(ranks)[rank]
            names_TK = None if names_TK is None else names_TK.chunk(ranks)[rank]
        x_TD, assignments = mine_SBD.flatten(0, 1), Assignments(experts_TK, gates_TK, keep_TK, names_TK)
        gated = self.moe.gate_on == "input"
        if gated:
            x_TD, assignments = with_gated_inputs(x_TD, assignments)
        slots = self._slots(routing, batch_ctx, x_SBD.shape[1])
        if self.parts > 1 and isinstance(self.dispatcher, AllToAllDispatcher):
            out_TD, shared_SBD = self._in_parts(self.dispatcher, x_SBD, x_TD, assignments, slots, batch_ctx)
        else:
            started = self.dispatcher.start(x_TD, assignments, slots)
            shared_SBD = None if self.shared is None else self.shared(x_SBD)
            sent = self.dispatcher.finish(started)
            out_TD = self.dispatcher.combine(self._answers(sent, batch_ctx), sent)
        out_TD = out_TD.unflatten(0, experts_TK.shape).sum(1) if gated else out_TD
        out_SBD = out_TD.view(mine_SBD.shape)
        if self.share_tokens:
            out_SBD = gather_from_sequence_parallel_region(out_SBD, tensor_parallel_output_grad=False, group=self.tp)
        return out_SBD if shared_SBD is None else out_SBD + shared_SBD

    def _answers(self, sent: Dispatched, batch_ctx: BatchContext, weights: ExpertWeights | None = None) -> Tensor:
        return self.experts(sent.rows, sent.counts, self._dropout(sent.names_R, batch_ctx), sent.names_R, weights)

    def _in_parts(
        self,
        dispatcher: AllToAllDispatcher,
        x_SBD: Tensor,
        x_TD: Tensor,
        assignments: Assignments,
        slots: int | None,
        batch_ctx: BatchContext,
    ) -> tuple[Tensor, Tensor | None]:
        """(the experts' answers, those of the shared experts). The experts of a part compute while the rows of the next
        ones arrive and the answers of those before it travel back. The order of these calls is that of the forward
        pass, and reversed that of the backward pass: autograd takes the operation that was called last first."""
        travelling = dispatcher.start_parts(x_TD, assignments, slots, self.parts)
        shared_SBD = None if self.shared is None else self.shared(x_SBD)
        # After the shared experts: in the backward pass the weights' gradients are joined while rows travel.
        weights = self.experts.weights().split(self.parts)
        returning: list[Returning] = []
        for started, mine in zip(travelling, weights, strict=True):
            sent = dispatcher.finish(started)
            returning.append(dispatcher.send_back(self._answers(sent, batch_ctx, mine), sent))
        return dispatcher.join(returning), shared_SBD
