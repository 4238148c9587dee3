"""The sparse layer: router -> dispatch -> experts -> combine, and the shared experts while rows travel.

Legend: S sequence (this rank's slice), B batch, D hidden, T = S * B tokens of this rank in sequence order, M tokens of
the micro-batch (all ranks that share it), K choices per token.
"""

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor, nn

from conf.schema import ModelConfig
from moe.balance import AttachLoss, capacity, load_balancing_loss, router_z_loss, within_capacity
from moe.dispatch import Choices, choose_dispatcher, make_dispatcher
from moe.draws import key
from moe.dropout import Dropout, name_choices
from moe.experts import Experts
from moe.recompute import decision, recomputed
from moe.router import Router, Routing
from moe.shared_experts import SharedExperts
from moe.statistics import LoadStatistics, Report
from parallel.collectives import all_gather
from parallel.forward_pass import EVALUATE, GENERATE, PLAIN, TRAIN, ForwardPass
from parallel.runtime import Groups


class MoELayer(nn.Module):
    """A Switch layer (Fedus et al. 2021, arXiv:2101.03961, section 2). Tokens whose choices are all dropped come out
    as zero: the residual around the layer passes them on."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        backend: str,
        dtype: torch.dtype,
        sequence_parallel: bool,
        groups: Groups,
        draws: tuple[int, int],
        dispatcher: str | None = None,
        shared: SharedExperts | None = None,
    ):
        """Args:
        draws: (seed of the run, layer), which name this layer's random numbers (moe.draws).
        dispatcher: how rows travel to their experts; None: what choose_dispatcher says.
        """
        super().__init__()
        self.moe, self.tp, self.draws = model.moe, groups.tp, draws
        self.recompute = "moe" in model.recompute
        # Without sequence parallelism all tensor-parallel ranks hold the same tokens: each sends its share of them.
        self.share_tokens = groups.tp.size() > 1 and not sequence_parallel
        self.micro_batch_group = groups.tp_cp if sequence_parallel else groups.cp
        self.router = Router(model, sequence_parallel=sequence_parallel, groups=groups)
        dispatcher = dispatcher or choose_dispatcher(model.moe, groups.ep.size(), groups.etp.size())[0]
        self.dispatcher = make_dispatcher(dispatcher, model.moe.num_experts, groups)
        self.shared = shared
        self.experts = Experts(model, backend=backend, dtype=dtype, groups=groups)
        self.statistics = LoadStatistics(model.moe.num_experts)
        # float64: exact sums, so that every layout sees the same load.
        self.register_buffer("step_load_E", torch.zeros(model.moe.num_experts, dtype=torch.float64), persistent=False)

    def forward(self, x_SBD: Tensor, about: ForwardPass = PLAIN) -> Tensor:
        out_SBD, report = self.run(x_SBD, about)
        self.record(report, about)
        return out_SBD

    def run(self, x_SBD: Tensor, about: ForwardPass) -> tuple[Tensor, Report]:
        """forward, but that what it counted is returned instead of recorded: this may run twice (moe.recompute)."""
        return recomputed(self._run, x_SBD, about) if self.recompute else self._run(x_SBD, about)

    def record(self, report: Report, about: ForwardPass) -> None:
        """Adds up what a training pass counted."""
        if about.mode == TRAIN:
            self.statistics.add(report)
            if self.router.bias is not None:
                self.step_load_E += report.load_E

    def _run(self, x_SBD: Tensor, about: ForwardPass) -> tuple[Tensor, Report]:
        routing = self.router(x_SBD.flatten(0, 1))
        keep_TK, loss, report = self._balance(routing, about, sequences=x_SBD.shape[1])
        out_SBD = self._experts(x_SBD, routing, keep_TK, about)
        return AttachLoss.apply(out_SBD, loss, about.loss_scale) if torch.is_grad_enabled() else out_SBD, report

    def _capacity_factor(self, about: ForwardPass) -> float | None:
        """None: dropless."""
        moe = self.moe
        return {TRAIN: moe.capacity_factor, EVALUATE: moe.eval_capacity_factor, GENERATE: None}[about.mode]

    def _balance(self, routing: Routing, about: ForwardPass, sequences: int) -> tuple[Tensor, Tensor, Report]:
        """(keep_TK, this rank's part of the weighted auxiliary losses, what to record). Capacity and load are those of
        the whole micro-batch, so all its ranks gather the choices and decide alike."""
        moe, experts_TK = self.moe, routing.experts_TK
        experts_MK = all_gather(experts_TK, self.micro_batch_group)
        factor = self._capacity_factor(about)
        keep_TK = torch.ones_like(experts_TK, dtype=torch.bool)
        if factor is not None:
            limit = capacity(experts_MK.shape[0], moe.top_k, moe.num_experts, factor)
            by_gate = moe.drop_policy == "probability"
            gates_MK = all_gather(routing.gates_TK.detach(), self.micro_batch_group) if by_gate else None
            keep_MK = within_capacity(experts_MK, moe.num_experts, limit, gates_MK)
            keep_TK = decision(keep_MK.chunk(self.micro_batch_group.size())[self.micro_batch_group.rank()])
        scope = sequences if moe.aux_loss_scope == "sequence" else 1
        aux = load_balancing_loss(routing.probs_TE, experts_MK, scope)
        z = router_z_loss(routing.logits_TE, experts_MK.shape[0])
        report = Report.of(routing.probs_TE, experts_TK, keep_TK, aux, z)
        return keep_TK, moe.aux_loss_coeff * aux + moe.z_loss_coeff * z, report

    def _slots(self, routing: Routing, about: ForwardPass) -> int | None:
        """Rows that every expert gets from this rank where they are padded to the capacity, else None."""
        factor = self._capacity_factor(about)
        if factor is None or not self.moe.pad_to_capacity:
            return None
        tokens = routing.experts_TK.shape[0]
        limit = capacity(tokens * self.micro_batch_group.size(), self.moe.top_k, self.moe.num_experts, factor)
        return min(limit, tokens // self.tp.size() if self.share_tokens else tokens)

    def _names(self, routing: Routing, about: ForwardPass) -> Tensor | None:
        """[T, K] names of the choices where noise belongs to them, else None."""
        if not self.moe.expert_dropout or about.mode != TRAIN:
            return None
        experts_TK, group = routing.experts_TK, self.micro_batch_group
        place = {"part": group.rank(), "parts": group.size(), "micro_batch": about.micro_batch}
        return name_choices(*experts_TK.shape, **place, device=experts_TK.device)

    def _dropout(self, names_R: Tensor | None, about: ForwardPass) -> Dropout | None:
        if names_R is None:
            return None
        seed, layer = self.draws
        named = key(seed, "expert dropout", about.step, layer)
        return Dropout(self.moe.expert_dropout, named, names_R, self.experts.ffn_hidden_size)

    def _experts(self, x_SBD: Tensor, routing: Routing, keep_TK: Tensor, about: ForwardPass) -> Tensor:
        gates_TK, experts_TK, mine_SBD = routing.gates_TK, routing.experts_TK, x_SBD
        names_TK = self._names(routing, about)
        if self.share_tokens:
            mine_SBD = scatter_to_sequence_parallel_region(x_SBD, group=self.tp)
            gates_TK = scatter_to_sequence_parallel_region(gates_TK, group=self.tp)
            rank, ranks = self.tp.rank(), self.tp.size()
            experts_TK, keep_TK = experts_TK.chunk(ranks)[rank], keep_TK.chunk(ranks)[rank]
            names_TK = None if names_TK is None else names_TK.chunk(ranks)[rank]
        choices = Choices(experts_TK, gates_TK, keep_TK, names_TK)
        started = self.dispatcher.start(mine_SBD.flatten(0, 1), choices, self._slots(routing, about))
        shared_SBD = None if self.shared is None else self.shared(x_SBD)
        sent = self.dispatcher.finish(started)
        y_RD = self.experts(sent.rows_RD, sent.counts, self._dropout(sent.names_R, about))
        out_SBD = self.dispatcher.combine(y_RD, sent).view(mine_SBD.shape)
        if self.share_tokens:
            out_SBD = gather_from_sequence_parallel_region(out_SBD, tensor_parallel_output_grad=False, group=self.tp)
        return out_SBD if shared_SBD is None else out_SBD + shared_SBD
