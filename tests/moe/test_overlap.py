"""Rows that travel in parts (model.moe.overlap_degree): what happens in which order, how long it takes, and that the
results are those of rows that travel at once. Whole models are compared in tests/parallel/test_parity.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import MoeConfig, ParallelConfig
from moe.expert_parts import split_weight
from moe.layer import MoELayer
from ops.experts import ExpertBackend, loop_experts
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference, main_gradient
from parallel import async_collectives
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import as_routed, assert_close, force_experts, random, run_layer, sparse_layer, tiny
from tests.parallel.helpers import started


@dataclass
class Machine:
    """A rank's processor and its link in virtual time: operations on each take their turn, and the two run at once.
    Time passes where the processor computes, and where it waits for the link."""

    per_row_sent: float = 1.0
    per_row_computed: float = 1.0
    """Forward; twice as much backward."""
    shared: float = 0.0
    """The shared experts."""
    now: float = 0.0
    link_is_free: float = 0.0
    events: list[str] = field(default_factory=list)

    def compute(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.events.append(name)

    def send(self, plain: Any, *args: Any) -> tuple[Tensor, Any]:
        (out, work), x = plain(*args), args[-1]
        self.link_is_free = max(self.now, self.link_is_free) + self.per_row_sent * len(x)
        self.events.append(f"send {len(x)}")
        return out, Handle(self, work, self.link_is_free, f"wait for {len(x)}")

    def experts(self, x: Tensor, counts: list[int], *weights: Any) -> Tensor:
        """An ops.experts.ExpertBackend's function."""
        return loop_experts(
            Computes.apply(x, self, f"experts {len(x)}", self.per_row_computed * len(x)), counts, *weights
        )


@dataclass
class Handle:
    machine: Machine
    work: Any
    done: float
    name: str

    def wait(self) -> None:
        self.work.wait()
        self.machine.now = max(self.machine.now, self.done)
        self.machine.events.append(self.name)


class Computes(torch.autograd.Function):
    """Passes x on, and lets time pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, machine: Machine, name: str, seconds: float) -> Tensor:
        ctx.told = machine, f"{name} backward", 2 * seconds
        machine.compute(name, seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        machine, name, seconds = ctx.told
        machine.compute(name, seconds)
        return grad, None, None, None


@contextmanager
def on_machine(machine: Machine) -> Iterator[None]:
    plain = async_collectives._all_to_all
    async_collectives._all_to_all = lambda *args: machine.send(plain, *args)
    try:
        yield
    finally:
        async_collectives._all_to_all = plain


def passes(world: World, moe: MoeConfig, experts: list[int], machine: Machine) -> tuple[Machine, float]:
    """The machine after a forward and a backward pass of a layer whose tokens go to these experts, and when the former
    ended."""
    with started(world, ParallelConfig(ep=2)) as runtime, on_machine(machine):
        layer = sparse_layer(tiny(moe), runtime, backend=ExpertBackend(machine.experts))
        if layer.shared is not None:
            told = (machine, "shared experts", machine.shared)
            layer.shared.register_forward_pre_hook(lambda _, args: (Computes.apply(*args, *told),))
        x_SBD = force_experts(layer, random(len(experts), 1, 8), experts).requires_grad_()
        out_SBD = run_layer(layer, x_SBD)
        forward = machine.now
        out_SBD.square().sum().backward()
    return machine, forward


def test_experts_compute_while_other_rows_travel(ranks) -> None:
    """Experts 0 and 1 are on rank 0, 2 and 3 on rank 1; the first part goes to experts 0 and 2. Each rank sends 2 rows
    to expert 0, 1 to 2, 3 to 1 and 2 to 3: in the first part 3, in the second 5. Rank 0 gets 4 and then 6 rows."""
    moe = MoeConfig(num_experts=4, capacity_factor=None, num_shared_experts=1, overlap_degree=2)
    forward = ["send 3", "send 5", "shared experts"]
    forward += ["wait for 3", "experts 4", "send 4"]  # the answers to the first part, while the second may be coming
    forward += ["wait for 5", "experts 6", "send 6", "wait for 4", "wait for 6"]
    backward = ["send 5", "send 3"]  # gradients of the answers, in the reverse order
    backward += ["wait for 5", "experts 6 backward", "send 6"]
    backward += ["wait for 3", "experts 4 backward", "send 4"]
    backward += ["shared experts backward", "wait for 6", "wait for 4"]
    (machine, _), _ = ranks.run(2, passes, moe, [0, 0, 2, 1, 1, 1, 3, 3], Machine(), timeout=300)
    assert machine.events == forward + backward


@pytest.mark.parametrize(
    ("degree", "machine", "forward", "backward"),
    [
        # 16 rows to send there and back, 16 to compute; backward twice the computing. At once: the sum.
        (1, Machine(1, 1), 16 + 16 + 16, 16 + 32 + 16),
        # The link is busy all the time: what is computed costs nothing.
        (4, Machine(1, 1), 32, 4 + 32 + 4),
        (4, Machine(1, 0.5), 32, 32),
        # The processor is busy but for the first part's way there and the last part's way back.
        (4, Machine(1, 4), 4 + 64 + 4, 4 + 128 + 4),
        (2, Machine(1, 4), 8 + 64 + 8, 8 + 128 + 8),
        # Shared experts compute during the way there, and their backward pass during the gradients' way back.
        (4, Machine(1, 4, shared=4), 4 + 64 + 4, 4 + 128 + 8),
    ],
    ids=lambda p: f"{p.per_row_computed:g} {p.shared:g}" if isinstance(p, Machine) else str(p),
)
def test_a_pass_takes_as_long_as_the_longer_of_the_two(
    degree: int, machine: Machine, forward: float, backward: float, ranks
) -> None:
    """In virtual time, so that a busy machine changes nothing: every expert gets two rows from each of two ranks."""
    moe = MoeConfig(num_experts=8, capacity_factor=None, overlap_degree=degree)
    moe.num_shared_experts = int(machine.shared > 0)
    for got, middle in ranks.run(2, passes, moe, [*range(8)] * 2, machine, timeout=300):
        assert (middle, got.now - middle) == (forward, backward), got.events


VARIANTS: dict[str, dict[str, Any]] = {
    "drops": {"capacity_factor": 0.75},
    "padded": {"pad_to_capacity": True, "capacity_factor": 0.75},
    "noisy": {"expert_dropout": 0.4, "expert_bias": True, "num_shared_experts": 1},
    "chunks": {"expert_chunk_rows": 5, "capacity_factor": None},
    "inputs": {"gate_on": "input", "score_function": "sigmoid", "renormalize": False},
}


def results(world: World, parallel: dict[str, int], fp8: bool) -> dict[str, dict[int, list[Tensor]]]:
    """Output and gradients of a layer of each variant, by overlap degree."""
    backend = ExpertBackend.on(Reference(RECIPES["blockwise"])) if fp8 else "loop"
    found: dict[str, dict[int, list[Tensor]]] = {}
    with started(world, ParallelConfig(**parallel)) as runtime:
        for name, settings in VARIANTS.items():
            found[name] = {}
            for degree in (1, 2, 4):
                moe = MoeConfig(num_experts=8, top_k=2, dispatcher="all_to_all", overlap_degree=degree, **settings)
                layer = sparse_layer(tiny(moe, recompute=["moe"] if name == "inputs" else []), runtime, backend=backend)
                x_SBD = random(16, 2, 8, seed=world.rank).requires_grad_()
                out_SBD = run_layer(layer, x_SBD)
                out_SBD.square().sum().backward()
                found[name][degree] = [out_SBD.detach(), x_SBD.grad, *(p.grad for p in layer.parameters())]
    return found


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
@pytest.mark.parametrize("parallel", [{"ep": 2}, {"ep": 2, "etp": 2}], ids=str)
def test_results_are_those_of_rows_that_travel_at_once(parallel: dict[str, int], fp8: bool, ranks) -> None:
    """Bit for bit: an expert's products are the same, and a token adds up two answers, in whatever order."""
    size = 2 * parallel.get("etp", 1)
    for found in ranks.run(size, results, parallel, fp8, timeout=300):
        for name, (at_once, *in_parts) in ((name, [*by_degree.values()]) for name, by_degree in found.items()):
            assert all(t.abs().max() > 0 for t in at_once), name
            for parts in in_parts:
                assert all(torch.equal(a, b) for a, b in zip(parts, at_once, strict=True)), name


class AddsToMain(Reference):
    """As backends on a GPU do."""

    def weight_gradient(self, x_RK: Any, dy_RN: Any, groups: Any, w: Tensor) -> Tensor:
        dw, main = super().weight_gradient(x_RK, dy_RN, groups, w), main_gradient(w)
        return dw if main is None else dw.mul_(main.add_(dw).new_tensor(torch.nan))


@pytest.mark.parametrize("backend", ["loop", "adds to main"])
@pytest.mark.parametrize("limit", [None, 4])
def test_gradients_of_parts_reach_the_main_gradient_once(backend: str, limit: int | None, runtime: Runtime) -> None:
    """Of two micro-batches. With a limit of 4 rows the second part is cut into pieces, which return their gradients
    instead of adding them."""
    mains = []
    for parts in (1, 2):
        gemm = ExpertBackend.on(AddsToMain()) if backend == "adds to main" else backend
        moe = MoeConfig(
            num_experts=4, capacity_factor=None, expert_bias=True, expert_chunk_rows=limit if parts > 1 else None
        )
        experts = sparse_layer(tiny(moe), runtime, backend=gemm).experts
        weights = list(experts.parameters())
        for w in weights:
            w.main_grad, w.grad_added_to_main_grad = torch.zeros_like(w), False
        for seed in range(2):
            x_RD = random(12, 8, seed=seed).to(runtime.device).requires_grad_()
            counts, ends = [1, 2, 3, 6], (0, 3, 12)
            if parts == 1:
                experts(as_routed(x_RD), counts).square().sum().backward()
            else:
                for p, mine in enumerate(experts.weights().split(2)):
                    rows_RD = x_RD[ends[p] : ends[p + 1]]
                    y_RD = experts(as_routed(rows_RD), counts[2 * p : 2 * p + 2], weights=mine)
                    total = y_RD.square().sum() + (total if p else 0.0)  # noqa: F821  # pyright: ignore
                total.backward()
            for w in weights:  # Megatron-Core's hook
                if not w.grad_added_to_main_grad:
                    w.main_grad += w.grad
                w.grad = None
        mains.append([w.main_grad for w in weights])
    for got, wanted in zip(*mains, strict=True):
        assert_close(got, wanted.cpu().double())


def test_parts_of_a_weight_are_views_of_it() -> None:
    w = torch.arange(12.0).view(4, 3).requires_grad_()
    first, second = split_weight(w, 2)
    assert second.data_ptr() == w[2:].data_ptr() and second.part_of == (w, slice(2, 4))
    (first.sum() + 2 * second.sum()).backward()
    assert w.grad.tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2


def test_what_stays_on_its_rank_travels_at_once(runtime: Runtime) -> None:
    layers: list[MoELayer] = [
        sparse_layer(tiny(MoeConfig(num_experts=4, top_k=2, overlap_degree=degree)), runtime) for degree in (1, 2)
    ]
    torch.testing.assert_close(*(layer(random(8, 2, 8))[0] for layer in layers), rtol=0, atol=0)
