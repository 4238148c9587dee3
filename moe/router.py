"""The router: which experts a token visits, and with what weight.

Legend: T tokens of this rank, M tokens of the micro-batch (all ranks that share it), D hidden, E experts, K choices per
token, G groups of experts, B sequences of the micro-batch, or 1 where it is balanced as a whole.
"""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from moe.balanced_routing import ForceBalance, expert_choice, plan_ranks, sinkhorn_potentials
from moe.capacity import capacity
from moe.score_functions import SCORE_FUNCTIONS, Scores, sparse_mixer_gates
from ops import te
from ops.implementations import DEFAULT_OPS, Ops
from ops.operation import Implementation, Operation
from ops.routing import FUSED_SCORE_FUNCTIONS, Choice, FusedRoute, RouterStats, Routing, Rule
from ops.run_context import RunContext
from parallel.activation_checkpoint import save_for_recompute
from parallel.batch_context import TRAIN
from parallel.collectives import all_gather
from parallel.process_groups import Groups
from parallel.sharding import mark, set_sharding


class Router(nn.Module):
    """Switch routing (Fedus et al. 2021, arXiv:2101.03961, eq. 1 and 2) with K choices, and what followed it: scores
    by softmax before or after the choice or by sigmoid; a choice limited to a few groups of experts, by a balanced
    plan, or by the experts. Weight and arithmetic are fp32 whatever the model's precision (Switch, section 2.4)."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        sequence_parallel: bool,
        groups: Groups,
        ops: Ops = DEFAULT_OPS,
    ):
        super().__init__()
        self.moe, self.ops = model.moe, ops
        self.micro_batch_group = groups.tp_cp if sequence_parallel else groups.cp
        self.experts_choose = self.moe.load_balancing == "expert_choice"
        moved = self.moe.bias_update_rate is not None or self.moe.num_expert_groups > 1
        by_loss = self.moe.load_balancing in ("aux_loss", "seq_aux_loss", "global_aux_loss")
        self.counts_scores = bool(moved and by_loss and self.moe.aux_loss_counts == "scores")
        # The number of experts that took a token says something itself, so its gates are left as they are.
        several = self.moe.top_k > 1 and not self.experts_choose
        self.score = SCORE_FUNCTIONS[self.moe.score_function].score
        self.rule = Rule(
            self.moe.top_k,
            score_function=self.moe.score_function,
            after=self.moe.softmax_order == "after",
            renormalize=several if self.moe.renormalize is None else self.moe.renormalize,
            scale=self.moe.routed_scaling_factor,
            groups=self.moe.num_expert_groups,
            top_k_groups=self.moe.top_k_groups,
        )
        weight_ED = nn.Parameter(torch.empty(self.moe.num_experts, model.hidden_size, dtype=torch.float32))
        self.weight = set_sharding(weight_ED, replicas=(groups.tp,), std=model.router_std)
        # As for the norms: summed over the tensor-parallel group when its ranks see different tokens.
        mark(self.weight, sequence_parallel=sequence_parallel, role="router")
        self.logit_bias: nn.Parameter | None = None
        if self.moe.router_bias:
            logit_bias_E = nn.Parameter(torch.empty(self.moe.num_experts, dtype=torch.float32))
            self.logit_bias = set_sharding(logit_bias_E, replicas=(groups.tp,), std=0.0)
            mark(self.logit_bias, sequence_parallel=sequence_parallel, role="router")
        # Set by rule and not by gradient, but kept, placed and saved as parameters.
        self.bias: nn.Parameter | None = None
        self.last_load: nn.Parameter | None = None
        """fp32 [E]: loads of the last optimizer step over their mean; before the first one they count as even."""
        if self.moe.bias_update_rate is not None:
            self.bias = self._state(groups, std=0.0)
        if self.moe.load_balancing == "global_aux_loss":
            self.last_load = self._state(groups, std=None)

    def _state(self, groups: Groups, std: float | None) -> nn.Parameter:
        state_E = nn.Parameter(torch.empty(self.moe.num_experts, dtype=torch.float32), requires_grad=False)
        return set_sharding(state_E, replicas=(groups.tp,), std=std, is_state=True)

    @property
    def follows_load(self) -> bool:
        """Whether it wants the loads of an optimizer step (end_step)."""
        return bool(self.moe.bias_update_rate) or self.last_load is not None

    def forward(
        self,
        x_TD: Tensor,
        padding_T: Tensor | None = None,
        mode: str = TRAIN,
        sequences: int = 1,
        replayed_TK: Tensor | None = None,
    ) -> Routing:
        """Args:
        padding_T: True where there is no token.
        mode: of parallel.batch_context; only training balances the choice by a plan.
        sequences: B of the router_stats, where tokens come in the order of (position, sequence).
        replayed_TK: the experts to choose, in this order; None: those that the router prefers.
        """
        logits_TE = self._logits(x_TD)
        if self.moe.force_balance and mode == TRAIN:
            logits_TE = ForceBalance.apply(logits_TE, self.moe.top_k)
        return self.route(logits_TE, padding_T, mode, sequences, replayed_TK)

    def _logits(self, x_TD: Tensor) -> Tensor:
        # Autocast would bring the product back to bf16.
        kind = x_TD.device.type
        is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if is_on else contextlib.nullcontext():
            logits_TE = self.ops.router_logits(x_TD, self.weight)
            return logits_TE if self.logit_bias is None else logits_TE + self.logit_bias

    def choose(self, x_TD: Tensor, padding_T: Tensor | None, mode: str) -> Choice:
        """forward, without what losses and metrics want: for generation, where every token counts in time."""
        logits_TE = self._logits(x_TD)
        scored = self.score(logits_TE)
        experts_TK = self._choose(logits_TE, scored.scores, padding_T, mode)
        may_lack = padding_T is not None or self.experts_choose
        return Choice(self._gates(logits_TE, scored, experts_TK, may_lack=may_lack), experts_TK)

    def route(
        self,
        logits_TE: Tensor,
        padding_T: Tensor | None,
        mode: str,
        sequences: int,
        replayed_TK: Tensor | None = None,
    ) -> Routing:
        """forward, of the logits."""
        counted_TK = self._counted(logits_TE.detach(), padding_T)
        if self.ops.route is not None and replayed_TK is None:  # the kernel chooses itself
            routing = self.ops.route(logits_TE, self.bias, padding_T, self.rule, sequences)
            return replace(routing, counted_TK=counted_TK)
        scored = self.score(logits_TE)
        if replayed_TK is None:
            experts_TK = self._choose(logits_TE.detach(), scored.scores.detach(), padding_T, mode)
        else:
            experts_TK = self._masked(replayed_TK, padding_T)
        experts_TK = save_for_recompute(experts_TK)
        gates_TK = self._gates(logits_TE, scored, experts_TK)
        router_stats = RouterStats.of(logits_TE, scored.probs, experts_TK, padding_T, sequences)
        return Routing(gates_TK, experts_TK, router_stats, logits_TE, counted_TK)

    def _gates(self, logits_TE: Tensor, scored: Scores, experts_TK: Tensor, *, may_lack: bool = True) -> Tensor:
        """[T, K] of the choice.

        Args:
            may_lack: whether a token may have fewer choices than K.
        """
        rule = self.rule
        some_TK = experts_TK
        if may_lack:
            some_TK = experts_TK.clamp(max=self.moe.num_experts - 1)  # where there is no choice the gate is not used
        if rule.after:
            gates_TK = logits_TE.gather(1, some_TK).softmax(-1)
        elif self.moe.sparse_mixer_eps is not None:
            gates_TK = sparse_mixer_gates(logits_TE, some_TK, self.moe.sparse_mixer_eps)
        else:
            gates_TK = scored.scores.gather(1, some_TK)
            if rule.renormalize:
                gates_TK = scored.renormalized(gates_TK, some_TK)
        return gates_TK if rule.scale == 1 else gates_TK * rule.scale

    def _counted(self, logits_TE: Tensor, padding_T: Tensor | None) -> Tensor | None:
        """Routing.counted_TK. In the order of the logits, which is that of the scores."""
        if not self.counts_scores:
            return None
        counted_TK = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.moe.top_k]
        if padding_T is not None:
            counted_TK = counted_TK.masked_fill(padding_T[:, None], self.moe.num_experts)
        return save_for_recompute(counted_TK)

    @torch.no_grad()
    def end_step(self, load_E: Tensor, counted_E: Tensor | None = None) -> None:
        """Takes in the loads of an optimizer step. The bias follows DeepSeek-V3's rule (arXiv:2412.19437, section
        2.1.2; arXiv:2408.15664, algorithm 1).

        Args:
            load_E: choices of each expert over the global batch of the step, exact, fp64.
            counted_E: the same of what the balancing loss counts (Routing.counted_TK); None: it counts the choices.
        """
        if self.bias is not None and self.moe.bias_update_rate:
            self.bias.add_(self.moe.bias_update_rate * (load_E.mean() - load_E).sign().to(self.bias.dtype))
        if self.last_load is not None:
            counted_E = load_E if counted_E is None else counted_E
            self.last_load.copy_(counted_E / counted_E.mean())

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, padding_T: Tensor | None, mode: str) -> Tensor:
        """The experts of each token [T, K], as Routing has them."""
        if self.experts_choose:
            return self._let_experts_choose(scores_TE, padding_T)
        planned = self.moe.load_balancing == "sinkhorn" and mode == TRAIN
        if planned:
            padding_M = None if padding_T is None else all_gather(padding_T, self.micro_batch_group)
            ranked_TE = logits_TE + sinkhorn_potentials(all_gather(logits_TE, self.micro_batch_group), padding_M)
        elif self.rule.after or self.moe.load_balancing == "sinkhorn" or self.moe.sparse_mixer_eps is not None:
            ranked_TE = logits_TE
        else:
            ranked_TE = scores_TE if self.bias is None else scores_TE + self.bias
        if self.moe.num_expert_groups > 1:
            ranked_TE = ranked_TE.masked_fill(~self._in_best_groups(ranked_TE), -torch.inf)
        if planned:
            ranked_TE = -plan_ranks(ranked_TE)
        # A stable sort, because topk breaks ties differently from device to device.
        experts_TK = ranked_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.moe.top_k]
        return self._masked(experts_TK, padding_T)

    def _masked(self, experts_TK: Tensor, padding_T: Tensor | None) -> Tensor:
        return experts_TK if padding_T is None else experts_TK.masked_fill(padding_T[:, None], self.moe.num_experts)

    def _let_experts_choose(self, scores_TE: Tensor, padding_T: Tensor | None) -> Tensor:
        moe, group = self.moe, self.micro_batch_group
        assert moe.capacity_factor is not None
        scores_ME = all_gather(scores_TE, group)
        padding_M = None if padding_T is None else all_gather(padding_T, group)
        tokens = len(scores_ME) if padding_M is None else int((~padding_M).sum())
        limit = min(tokens, capacity(tokens, moe.top_k, moe.num_experts, moe.capacity_factor))
        experts_MK = expert_choice(scores_ME, limit, padding_M)
        return experts_MK.narrow(0, group.rank() * len(scores_TE), len(scores_TE))

    def _in_best_groups(self, scores_TE: Tensor) -> Tensor:
        """bool [T, E]: experts of the top_k_groups groups with the highest scores: the sum of a group's two best
        (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), or its best (DeepSeek-V2, arXiv:2405.04434, section 2.2.2)."""
        groups, best = self.moe.num_expert_groups, {"top2": 2, "max": 1}[self.moe.group_score]
        score_TG = scores_TE.unflatten(1, (groups, -1)).topk(best, dim=-1).values.sum(-1)
        chosen = score_TG.sort(dim=-1, descending=True, stable=True).indices[:, : self.moe.top_k_groups]
        allowed_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, chosen, True)
        return allowed_TG.repeat_interleave(scores_TE.shape[1] // groups, dim=1)


def _chooses_otherwise(context: RunContext) -> str | None:
    """What no kernel does."""
    moe = context.model.moe
    if moe.score_function not in FUSED_SCORE_FUNCTIONS:
        return f"has no {moe.score_function} scores"
    if moe.sparse_mixer_eps is not None:
        return "has no SparseMixer"
    if moe.load_balancing in ("sinkhorn", "expert_choice"):
        return f"routes each token by itself, and {moe.load_balancing} chooses over the whole micro-batch"
    return None


def _no_triton_router(context: RunContext) -> str | None:
    if context.model.moe.num_expert_groups > 1:
        return "takes no num_expert_groups: it chooses groups of experts first"
    return _chooses_otherwise(context)


def _no_te_router(context: RunContext) -> str | None:
    moe, softmax = context.model.moe, context.model.moe.score_function == "softmax"
    if {"moe", "full"} & {*context.model.recompute}:
        return "chooses anew where a layer is recomputed"
    if softmax and moe.bias_update_rate is not None:
        return "takes a bias for sigmoid scores alone"
    if not softmax and (moe.softmax_order == "after" or (moe.top_k > 1 and moe.renormalize is False)):
        return "divides sigmoid gates by their sum"
    if moe.num_expert_groups > 1:
        best = {"top2": 2, "max": 1}[moe.group_score]
        if moe.top_k != best * moe.top_k_groups:
            return f"scores a group by its best top_k / top_k_groups experts, not by {best}"
        if softmax and moe.softmax_order == "before" and moe.renormalize is not False:
            return "scores groups by logits where it divides gates by their sum"
    return _chooses_otherwise(context)


def _te_route(context: RunContext) -> FusedRoute:
    from ops.te_routing import TeRoute

    return te.load(TeRoute)


def _trial(route: FusedRoute | None, context: RunContext) -> list[Tensor]:
    """What the model's router makes of random logits of two sequences, with padding and a bias if it has one, and the
    gradient of the logits."""
    tokens, experts, device = 122, context.model.moe.num_experts, context.device

    def draw(*shape: int, seed: int) -> Tensor:
        return context.randn(*shape, seed=seed, dtype=torch.float32)

    router = Router(context.model, sequence_parallel=False, groups=context.groups, ops=Ops(route=route)).to(device)
    logits_TE, padding_T = draw(tokens, experts, seed=0).requires_grad_(), torch.arange(tokens, device=device) % 7 == 3
    if router.bias is not None:
        router.bias.data.copy_(0.1 * draw(experts, seed=1))
    routing = router.route(logits_TE, padding_T, TRAIN, sequences=2)
    stats = routing.router_stats
    gates_TK = routing.gates_TK.masked_fill(padding_T[:, None], 0.0)  # no one looks at these
    loss = (
        (gates_TK * draw(*gates_TK.shape, seed=2)).sum()
        + (stats.probs_BE * draw(2, experts, seed=3)).sum()
        + 0.1 * stats.z
    )
    (gradient,) = torch.autograd.grad(loss, logits_TE)
    sums = [stats.probs_BE, stats.z, stats.entropy, stats.logit_square]
    values = [gates_TK, *sums, gradient]
    return [routing.experts_TK, stats.load_BE, *(value.detach() for value in values)]


ROUTE: Operation[FusedRoute | None] = Operation(
    field="route",
    name="router",
    reference=lambda context: Implementation("torch", lambda context: None, "softmax, a stable sort, sums"),
    implementations=[
        Implementation("Triton", "ops.triton.router:route", device="cuda", unsupported_reason=_no_triton_router),
        Implementation(te.NAME, _te_route, device="cuda", is_supported=te.is_meant, unsupported_reason=_no_te_router),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5},
    is_used=lambda context: bool(context.model.moe.num_experts),
)
"""The reference is Router's own code: None."""
