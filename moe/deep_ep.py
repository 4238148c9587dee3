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

from ops.dispatch import Assignments, Dispatched, DispatcherFactory
from ops.operation import Implementation, is_absent
from ops.permute import PermutedTokens, PermuteIndices, by_expert, unpermute
from ops.run_context import RunContext
from parallel.process_groups import Groups

_buffers: dict[tuple[dist.ProcessGroup, int], Any] = {}


def unsupported_reason(context: RunContext) -> str | None:
    """Why DeepEP cannot serve this run, whether installed or not; None: it can."""
    moe = context.model.moe
    if context.groups.ep.size() == 1:
        return "needs parallel.ep > 1"
    if context.device.type != "cuda":
        return "needs GPUs"
    if context.dtype != torch.bfloat16:
        return "needs precision=bf16"
    if context.groups.etp.size() > 1:
        return "needs parallel.etp=1"
    if moe.load_balancing == "expert_choice":
        return "needs another model.moe.load_balancing than expert_choice: it takes as many choices from every rank"
    if moe.overlap_degree > 1:
        return "needs model.moe.overlap_degree=1: a token travels once for all experts of a rank, not in parts"
    if moe.pad_to_capacity:
        return "needs model.moe.pad_to_capacity=false: it counts tokens itself"
    if moe.expert_dropout:
        return "needs model.moe.expert_dropout=0: it does not carry the names of rows"
    return None


def _buffer(group: dist.ProcessGroup, hidden_size: int) -> Any:
    """Memory that DeepEP's kernels write to across ranks; one for all layers."""
    from deep_ep import Buffer  # pyright: ignore[reportAttributeAccessIssue]  # the package, not this file

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
    def forward(ctx: Any, buffer: Any, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Any:
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
    def backward(ctx: Any, dx_ND: Tensor, dgates_NK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx_TD, dgates_TK, _ = ctx.buffer.combine(dx_ND.contiguous(), ctx.handle, topk_weights=dgates_NK.float())
        return None, dx_TD, dgates_TK, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Any, y_ND: Tensor, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y_ND, handle)[0]

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.buffer.dispatch(dout_TD.contiguous(), handle=ctx.handle)[0], None


class DeepEPDispatcher:
    """ops.dispatch.Dispatcher. The sending is not overlapped with other computing."""

    def __init__(self, num_experts: int, groups: Groups, hidden_size: int):
        self.num_experts, self.local = num_experts, num_experts // groups.ep.size()
        self.buffer = _buffer(groups.ep, hidden_size)

    def start(self, x_TD: Tensor, assignments: Assignments, slots: int | None = None) -> Dispatched:
        assert slots is None and assignments.names_TK is None
        keep_TK = assignments.keep_TK
        keep_TK = assignments.experts_TK < self.num_experts if keep_TK is None else keep_TK
        experts_TK = torch.where(keep_TK, assignments.experts_TK, -1)
        x_ND, gates_NK, experts_NK, arrived = _Send.apply(
            self.buffer, x_TD, assignments.gates_TK.float(), experts_TK, self.num_experts
        )
        # Here experts are counted from this rank's first; -1 is another rank's.
        here = torch.where(experts_NK >= 0, experts_NK, self.local)
        choice_R = by_expert(here.flatten(), self.local)[0][: sum(arrived.counts)]
        rows = PermutedTokens(x_ND, PermuteIndices(choice_R, here.shape[1]))
        return Dispatched(rows, arrived.counts, None, (choice_R, gates_NK, arrived.handle))

    def finish(self, started: Dispatched) -> Dispatched:
        return started

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        choice_R, gates_NK, handle = sent.way_back
        return _Return.apply(self.buffer, unpermute(y_RD, choice_R, gates_NK, padded=False), handle)


def _load(context: RunContext) -> DispatcherFactory:
    try:
        import deep_ep  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except Exception as error:
        if is_absent(error):
            raise ModuleNotFoundError("not installed: DeepEP", name="deep_ep") from error
        raise
    return lambda num_experts, hidden_size, groups, permutation: DeepEPDispatcher(num_experts, groups, hidden_size)


DEEP_EP = Implementation(
    "deep_ep",
    _load,
    is_supported=lambda context: unsupported_reason(context) is None,
    unsupported_reason=lambda context: unsupported_reason(context),
    label="DeepEP",
)
