"""DeepEP (github.com/deepseek-ai/DeepEP, its Buffer interface) as a way to the experts, where it is installed and has
shown on this machine that it computes the same.

A token travels once to each rank that has an expert for it, and not once for each expert; the answers of a rank's
experts are added up before they travel back. Its kernels take bf16 alone.

Legend: T tokens of this rank, D hidden, E experts, L experts of this rank, K choices per token, N tokens that arrived.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import MoeConfig
from moe.dispatcher import AllToAllDispatcher, Choices, Dispatched, Dispatcher, by_expert, choose_dispatcher
from ops.permute import Origin, Routed, weighted_sum
from ops.registry import Candidate, select
from parallel.process_groups import Groups

NAME = "deep_ep"
TOLERANCE = 2e-2
"""Sums in bf16, in another order."""
_buffers: dict[tuple[dist.ProcessGroup, int], Any] = {}


def obstacle(moe: MoeConfig, device: torch.device, dtype: torch.dtype, ep: int, etp: int) -> str | None:
    """Why DeepEP cannot serve this run, whether installed or not; None: it can."""
    if ep == 1:
        return "needs parallel.ep > 1"
    if device.type != "cuda":
        return "needs GPUs"
    if dtype != torch.bfloat16:
        return "needs precision=bf16"
    if etp > 1:
        return "needs parallel.etp=1"
    if moe.load_balancing == "expert_choice":
        return "needs another model.moe.load_balancing than expert_choice: it takes as many choices from every rank"
    if moe.pad_to_capacity:
        return "needs model.moe.pad_to_capacity=false: it counts tokens itself"
    if moe.expert_dropout:
        return "needs model.moe.expert_dropout=0: it does not carry the names of rows"
    return None


def _buffer(group: dist.ProcessGroup, hidden_size: int) -> Any:
    """Memory that DeepEP's kernels write to across ranks; one for all layers."""
    from deep_ep import Buffer

    if (group, hidden_size) not in _buffers:
        hidden_bytes, nvl, rdma = hidden_size * 2, 0, 0
        for config in (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())):
            nvl = max(nvl, config.get_nvl_buffer_size_hint(hidden_bytes, group.size()))
            rdma = max(rdma, config.get_rdma_buffer_size_hint(hidden_bytes, group.size()))
        _buffers[group, hidden_size] = Buffer(group, nvl, rdma)
    return _buffers[group, hidden_size]


@dataclass(frozen=True)
class _Arrived:
    """What came to this rank, apart from the gradient's way."""

    counts: list[int]
    handle: Any


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer: Any, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Any:
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(experts_TK, num_experts)
        x_ND, experts_NK, gates_NK, counts, handle, _ = buffer.dispatch(
            x_TD,
            topk_idx=experts_TK,
            topk_weights=gates_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(experts_NK)
        return x_ND, gates_NK, experts_NK, _Arrived(counts, handle)

    @staticmethod
    def backward(ctx, dx_ND: Tensor, dgates_NK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx_TD, dgates_TK, _ = ctx.buffer.combine(dx_ND.contiguous(), ctx.handle, topk_weights=dgates_NK.float())
        return None, dx_TD, dgates_TK, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer: Any, y_ND: Tensor, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y_ND, handle)[0]

    @staticmethod
    def backward(ctx, dout_TD: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.buffer.dispatch(dout_TD.contiguous(), handle=ctx.handle)[0], None


class DeepEPDispatcher:
    """moe.dispatcher.Dispatcher. The sending is not overlapped with other computing."""

    def __init__(self, num_experts: int, groups: Groups, hidden_size: int):
        self.num_experts, self.local = num_experts, num_experts // groups.ep.size()
        self.buffer = _buffer(groups.ep, hidden_size)

    def start(self, x_TD: Tensor, choices: Choices, slots: int | None = None) -> Dispatched:
        assert slots is None and choices.names_TK is None
        experts_TK = torch.where(choices.keep_TK, choices.experts_TK, -1)
        x_ND, gates_NK, experts_NK, arrived = _Send.apply(
            self.buffer, x_TD, choices.gates_TK.float(), experts_TK, self.num_experts
        )
        # Here experts are counted from this rank's first; -1 is another rank's.
        here = torch.where(experts_NK >= 0, experts_NK, self.local)
        choice_R = by_expert(here.flatten(), self.local)[0][: sum(arrived.counts)]
        rows = Routed(x_ND, Origin(choice_R, here.shape[1]))
        return Dispatched(rows, arrived.counts, None, (choice_R, gates_NK, arrived.handle))

    def finish(self, started: Dispatched) -> Dispatched:
        return started

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        choice_R, gates_NK, handle = sent.way_back
        return _Return.apply(self.buffer, weighted_sum(y_RD, choice_R, gates_NK, padded=False), handle)


def select_dispatcher(
    moe: MoeConfig, hidden_size: int, groups: Groups, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """(dispatcher, why), the same on every rank: DeepEP where it can serve and equals our all-to-all, output and
    gradients, else what choose_dispatcher says.

    Raises:
        ValueError: DeepEP was asked for and cannot serve, is not installed, or differs.
    """
    asked, ep, etp = moe.dispatcher == NAME, groups.ep.size(), groups.etp.size()
    why_not = obstacle(moe, device, dtype, ep, etp)
    if moe.dispatcher not in ("auto", NAME) or (why_not and not asked):
        return choose_dispatcher(moe, ep, etp)
    if why_not is None:
        agrees, why = prove(moe, hidden_size, groups, device)
        if agrees:
            return NAME, why
        why_not = why
    if asked:
        raise ValueError(f"model.moe.dispatcher={NAME}: {why_not}. Use model.moe.dispatcher=auto")
    name, why = choose_dispatcher(moe, ep, etp)
    return name, f"{why}; {why_not}"


def prove(moe: MoeConfig, hidden_size: int, groups: Groups, device: torch.device) -> tuple[bool, str]:
    """Whether DeepEP is there and does with random tokens what our all-to-all does. All ranks call this together."""

    def load() -> Any:
        return DeepEPDispatcher(moe.num_experts, groups, hidden_size)

    def installed() -> bool:
        try:
            import deep_ep  # noqa: F401
        except Exception:
            return False
        return True

    def all_say(yes: bool) -> bool:
        word = torch.tensor(int(yes), device=device)
        dist.all_reduce(word, op=dist.ReduceOp.MIN, group=groups.world)
        return bool(word)

    # Asked before the trial: ranks without it would leave the others waiting.
    if not all_say(installed()):
        return False, "not installed: DeepEP"
    ours: Dispatcher = AllToAllDispatcher(moe.num_experts, groups)
    trial = _trial(moe, hidden_size, groups, device)
    chosen, choice = select("dispatch", [Candidate("DeepEP", load)], ("all_to_all", ours), trial, TOLERANCE)
    if not all_say(chosen is not ours):
        return False, choice.why if chosen is ours else "DeepEP differs on another rank and is left out"
    return True, choice.why.replace("torch's", "all_to_all")


def _trial(moe: MoeConfig, hidden_size: int, groups: Groups, device: torch.device) -> Any:
    """Runs a dispatcher on random tokens, some choices dropped, with experts that multiply by 1, 2, 3, ..."""
    generator = torch.Generator().manual_seed(groups.ep.rank())
    tokens = 64
    x_TD = torch.randn(tokens, hidden_size, generator=generator).to(device, torch.bfloat16)
    experts_TK = torch.rand(tokens, moe.num_experts, generator=generator).argsort(1)[:, : moe.top_k].to(device)
    gates_TK = torch.rand(tokens, moe.top_k, generator=generator).to(device)
    keep_TK = (torch.rand(tokens, moe.top_k, generator=generator) < 0.9).to(device)
    local = moe.num_experts // groups.ep.size()

    def run(dispatcher: Dispatcher) -> list[Tensor]:
        x, gates = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
        sent = dispatcher.finish(dispatcher.start(x, Choices(experts_TK, gates, keep_TK)))
        factors = torch.arange(local, device=device) + 1 + local * groups.ep.rank()
        per_row = factors.repeat_interleave(torch.tensor(sent.counts, device=device))
        rows_RD = sent.rows.gather()
        out = dispatcher.combine(rows_RD * per_row[:, None].to(rows_RD.dtype), sent)
        out.float().square().sum().backward()
        assert x.grad is not None and gates.grad is not None
        return [out.detach(), x.grad, gates.grad]

    return run
