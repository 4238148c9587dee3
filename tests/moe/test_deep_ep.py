"""DeepEP's interface on gloo, faithfully and not: it is used only when it computes what our all-to-all does."""

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf import schema
from conf.schema import ModelConfig, MoeConfig, ParallelConfig
from ops.run_context import RunContext
from parallel.env import World
from tests.parallel.helpers import started

MOE = MoeConfig(num_experts=4, top_k=2)
HIDDEN = 16


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Buffer:
    """deep_ep.Buffer as its documentation has it: a token travels once to each rank that it has an expert on; choices
    are renumbered from that rank's first expert, others' are -1; combine adds up without weights."""

    scale, scale_gradient = 1.0, 1.0

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int):
        assert num_nvl_bytes == HIDDEN * 2 * group.size() and num_rdma_bytes == 0
        self.group = group

    @staticmethod
    def get_dispatch_config(ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> Any:
        local = num_experts // self.group.size()
        ranks = torch.arange(self.group.size())
        in_rank = ((topk_idx[:, :, None] // local == ranks) & (topk_idx[:, :, None] >= 0)).any(1)
        per_expert = (topk_idx[:, :, None] == torch.arange(num_experts)).sum((0, 1)).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def everyones(self, mine: Any) -> list[Any]:
        told: list[Any] = [None] * self.group.size()
        dist.all_gather_object(told, mine, group=self.group)
        return told

    def dispatch(self, x: Tensor, handle: Any = None, topk_idx: Any = None, topk_weights: Any = None, **layout: Any):
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        me = self.group.rank()
        if handle is not None:
            xs = self.everyones(x)
            rows = torch.cat([x[in_rank[:, me]] for x, in_rank in zip(xs, handle, strict=True)])
            return rows * self.scale_gradient, None, None, None, None, None
        assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32
        in_rank, per_expert = layout["is_token_in_rank"], layout["num_tokens_per_expert"]
        assert layout["num_tokens_per_rank"].tolist() == in_rank.sum(0).tolist()
        xs, idxs, weights, in_ranks, counts = zip(
            *self.everyones((x, topk_idx, topk_weights, in_rank, per_expert)), strict=True
        )
        local = len(per_expert) // self.group.size()
        mine = [r[:, me] for r in in_ranks]
        idx = torch.cat([i[m] for i, m in zip(idxs, mine, strict=True)])
        weight = torch.cat([w[m] for w, m in zip(weights, mine, strict=True)])
        here = idx // local == me
        per_local_expert = sum(counts)[me * local : (me + 1) * local].tolist()
        rows = torch.cat([x[m] for x, m in zip(xs, mine, strict=True)]) * self.scale
        idx, weight = torch.where(here, idx - me * local, -1), torch.where(here, weight, 0.0)
        return rows, idx, weight, per_local_expert, in_ranks, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> Any:
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        me, told = self.group.rank(), self.everyones((x, topk_weights))
        out, weights = torch.zeros(len(handle[me]), x.shape[1]), None
        if topk_weights is not None:
            weights = torch.zeros(len(handle[me]), topk_weights.shape[1])
        for rank, (rows, their_weights) in enumerate(told):
            first = sum(int(in_rank[:, rank].sum()) for in_rank in handle[:me])
            mine = handle[me][:, rank]
            piece = slice(first, first + int(mine.sum()))
            out[mine] += rows[piece].float()
            if weights is not None:
                weights[mine] += their_weights[piece]
        return out.bfloat16(), weights, None


class WrongBuffer(Buffer):
    scale = 1.05


class WrongGradient(Buffer):
    scale_gradient = 1.05


class BrokenBuffer(Buffer):
    def dispatch(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("NVSHMEM is not initialised")


def selected(world: World, buffers: list[Any], moe: MoeConfig) -> Any:
    """What a rank selects when `deep_ep` has such a Buffer (None: is not installed there), as if on a GPU."""
    from moe import deep_ep
    from moe.dispatcher import DISPATCH
    from tests.moe.helpers import run_context, selected, tiny

    deep_ep._buffers.clear()
    unsupported_reason, deep_ep.unsupported_reason = deep_ep.unsupported_reason, lambda _: None
    if buffers[world.rank] is not None:
        sys.modules["deep_ep"] = types.SimpleNamespace(Buffer=buffers[world.rank])
    try:
        with started(world, ParallelConfig(ep=2)) as runtime:
            try:
                _, row = selected(DISPATCH, run_context(tiny(moe, hidden_size=HIDDEN), runtime, torch.bfloat16))
                return row.name, row.why
            except ValueError as error:
                return str(error)
    finally:
        sys.modules.pop("deep_ep", None)
        deep_ep.unsupported_reason = unsupported_reason


def test_what_computes_the_same_is_used(ranks) -> None:
    for name, why in ranks.run(2, selected, [Buffer, Buffer], MOE, timeout=60):
        assert name == "deep_ep" and why.startswith("equals all_to_all within")


@pytest.mark.parametrize(
    ("buffers", "reason"),
    [
        ([WrongBuffer, WrongBuffer], "DeepEP differs"),
        ([WrongGradient, WrongGradient], "DeepEP differs"),
        ([BrokenBuffer, BrokenBuffer], "DeepEP failed its trial (RuntimeError: NVSHMEM is not initialised)"),
        ([None, None], "not installed: DeepEP"),
        ([Buffer, None], "not installed: DeepEP"),
    ],
    ids=["output", "gradient", "broken", "absent", "absent on one rank"],
)
def test_what_does_not_is_left_out_on_every_rank(buffers: list[Any], reason: str, ranks) -> None:
    for answer in ranks.run(2, selected, buffers, MOE, timeout=60):
        assert answer[0] == "all_to_all" and reason in answer[1], answer
    asked = MoeConfig(num_experts=4, top_k=2, dispatcher="deep_ep")
    for message in ranks.run(2, selected, buffers, asked, timeout=60):
        assert reason in message and "Use model.moe.dispatcher=auto" in message


def layer_passes(world: World) -> list[list[Tensor]]:
    """[output, gradients] of a layer in bf16 under DeepEP's interface and under all-to-all, some choices dropped."""
    from models.init import initialise
    from moe import deep_ep
    from moe.dispatcher import DISPATCHERS
    from moe.layer import MoELayer
    from ops.implementations import Ops
    from tests.moe.helpers import random, run_layer, tiny

    deep_ep._buffers.clear()
    sys.modules["deep_ep"] = types.SimpleNamespace(Buffer=Buffer)
    results = []
    try:
        with started(world, ParallelConfig(ep=2)) as runtime:
            moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=1.0)
            for dispatcher in (deep_ep.DEEP_EP.loaded(None), DISPATCHERS["all_to_all"]):
                layer = MoELayer(
                    tiny(moe, hidden_size=HIDDEN),
                    ops=Ops(dispatcher=dispatcher),
                    dtype=torch.bfloat16,
                    sequence_parallel=False,
                    groups=runtime.groups,
                    draws=(1, 0),
                )
                initialise(layer, 1)
                x_SBD = random(6, 2, HIDDEN, seed=world.rank).bfloat16().requires_grad_()
                out_SBD = run_layer(layer, x_SBD)
                out_SBD.float().square().sum().backward()
                results.append([out_SBD.detach(), x_SBD.grad, *(p.grad for p in layer.parameters())])
    finally:
        sys.modules.pop("deep_ep", None)
    return results


def test_a_layer_computes_the_same_through_it(ranks) -> None:
    for through_it, wanted in ranks.run(2, layer_passes, timeout=60):
        for got, want in zip(through_it, wanted, strict=True):
            assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("moe", "device", "dtype", "ep", "etp", "needs"),
    [
        ({}, CUDA, torch.bfloat16, 2, 1, None),
        ({}, CUDA, torch.bfloat16, 1, 1, "parallel.ep > 1"),
        ({}, CPU, torch.bfloat16, 2, 1, "GPUs"),
        ({}, CUDA, torch.float32, 2, 1, "precision=bf16"),
        ({}, CUDA, torch.bfloat16, 2, 2, "parallel.etp=1"),
        ({"pad_to_capacity": True}, CUDA, torch.bfloat16, 2, 1, "pad_to_capacity=false"),
        ({"load_balancing": "expert_choice"}, CUDA, torch.bfloat16, 2, 1, "another model.moe.load_balancing"),
        ({"expert_dropout": 0.1}, CUDA, torch.bfloat16, 2, 1, "expert_dropout=0"),
        ({"overlap_degree": 2}, CUDA, torch.bfloat16, 2, 1, "overlap_degree=1"),
    ],
)
def test_it_says_what_it_needs(
    moe: dict[str, Any], device: torch.device, dtype: torch.dtype, ep: int, etp: int, needs: str | None
) -> None:
    from moe.deep_ep import unsupported_reason

    groups = SimpleNamespace(ep=SimpleNamespace(size=lambda: ep), etp=SimpleNamespace(size=lambda: etp))
    config = schema.Config(model=ModelConfig(moe=MoeConfig(num_experts=4, **moe)))
    told = unsupported_reason(RunContext(config, SimpleNamespace(device=device, groups=groups), dtype))
    assert told is None if needs is None else needs in told
