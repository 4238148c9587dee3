"""Experts that compute some rows at a time: the same answer with a bounded hidden width."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measurement import peak_bytes
from conf.schema import MoeConfig
from models.init import initialise
from moe.chunked_experts import pieces
from moe.experts import Experts
from ops.experts import LOOP, ExpertBackend
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference, Weight, main_gradient
from ops.grouped_mlp import forget_weights
from parallel.process_groups import Runtime
from tests.moe.helpers import EVERY_BACKEND, as_routed, assert_close, expert_backend, random, sparse_layer, tiny


def test_pieces_by_hand() -> None:
    """At most 4 rows: experts 0 and 1 share a piece, 2 has three of its own, 3 would not fit beside 4, 5 has no row."""
    assert list(pieces([1, 3, 9, 2, 3, 0], 4)) == [
        (slice(0, 2), [(slice(0, 4), [1, 3])]),
        (slice(2, 3), [(slice(4, 8), [4]), (slice(8, 12), [4]), (slice(12, 13), [1])]),
        (slice(3, 4), [(slice(13, 15), [2])]),
        (slice(4, 6), [(slice(15, 18), [3, 0])]),
    ]


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), limit=st.integers(1, 10))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pieces_are_all_rows_once_and_none_too_large(counts: list[int], limit: int) -> None:
    rows, experts, of_each = [], [], [0] * len(counts)
    for mine, parts in pieces(counts, limit):
        experts += range(len(counts))[mine]
        for piece, here in parts:
            assert piece.stop - piece.start == sum(here) <= limit
            rows += range(piece.start, piece.stop)
            for e, n in zip(range(len(counts))[mine], here, strict=True):
                of_each[e] += n
    assert experts == list(range(len(counts))) and rows == list(range(sum(counts))) and of_each == counts


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("counts", [[3, 0, 20, 1], [0, 0, 0, 24], [6, 6, 6, 6], [0, 0, 0, 0]])
def test_answers_and_gradients_are_those_of_all_rows_at_once(counts: list[int], backend: str, runtime: Runtime) -> None:
    results = []
    for limit in (None, 5):
        moe = MoeConfig(num_experts=4, capacity_factor=None, expert_bias=True, expert_chunk_rows=limit)
        experts = Experts(tiny(moe), backend=expert_backend(backend), dtype=torch.float32, groups=runtime.groups)
        initialise(experts.to(runtime.device), seed=1)
        experts.b_in.data.normal_(generator=torch.Generator().manual_seed(0))
        x_RD = random(sum(counts), 8).to(runtime.device).requires_grad_()
        y_RD = experts(as_routed(x_RD), counts)
        y_RD.square().sum().backward()
        results.append([y_RD, x_RD.grad, *(p.grad for p in experts.parameters())])
    for whole, chunked in zip(*results, strict=True):
        assert chunked.shape == whole.shape
        if whole.numel():
            assert_close(chunked, whole.detach().cpu().double())


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_rounded_once_for_all_pieces_of_a_step(recipe: str, runtime: Runtime) -> None:
    """Three pieces or more in each of two micro-batches, forward and backward; one expert's own among them. What comes
    out is what all rows at once give."""
    rounded: list[torch.Size] = []

    class Counting(Reference):
        def weight(self, w_LKN: torch.Tensor) -> Weight:
            rounded.append(w_LKN.shape)
            return super().weight(w_LKN)

    results = []
    for limit in (None, 20):
        gemm = Counting(RECIPES[recipe])
        model = tiny(MoeConfig(num_experts=4, expert_chunk_rows=limit), hidden_size=160, ffn_hidden_size=136)
        experts = Experts(model, backend=ExpertBackend.on(gemm), dtype=torch.float32, groups=runtime.groups)
        initialise(experts.to(runtime.device), seed=1)
        rounded.clear()
        told = []
        for seed, counts in enumerate([[3, 0, 130, 1], [9, 12, 20, 3]]):
            x_RD = random(sum(counts), 160, seed=seed).to(runtime.device).requires_grad_()
            y_RD = experts(as_routed(x_RD), counts)
            y_RD.sum().backward()
            told += [y_RD.detach(), x_RD.grad]
        results.append([*told, *(p.grad for p in experts.parameters())])
        wanted = [experts.w_in.flatten(2).shape, experts.w_out.shape]
        assert rounded == wanted
        forget_weights(experts)
        experts(as_routed(x_RD), counts)
        assert rounded == 2 * wanted
    if recipe != "tensorwise":  # which scales the rows of a piece together
        for whole, chunked in zip(*results, strict=True):
            assert_close(chunked, whole.cpu().double())


def test_memory_of_the_hidden_width_is_bounded_when_one_expert_gets_half_of_all(runtime: Runtime) -> None:
    """Two sizes of a batch whose second half goes to one expert: what a row costs beyond its way in and out. Hidden
    width 64 times the model's: 64 * 8 * 4 bytes for the gate, as many for up."""
    cost = {}
    for limit in (None, 64):
        moe = MoeConfig(num_experts=4, capacity_factor=None, expert_chunk_rows=limit)
        experts = Experts(tiny(moe, ffn_hidden_size=512), backend=LOOP, dtype=torch.float32, groups=runtime.groups)
        initialise(experts.to(runtime.device), seed=1)
        peaks = []
        for rows in (512, 1024):
            counts = [rows // 6, rows // 6, rows // 2, rows - rows // 2 - 2 * (rows // 6)]
            x_RD = random(rows, 8).to(runtime.device).requires_grad_()
            peaks.append(peak_bytes(lambda x=x_RD, n=counts, e=experts: e(as_routed(x), n).sum().backward()))
        cost[limit] = (peaks[1] - peaks[0]) / 512
    assert cost[None] > 2 * 512 * 4, cost
    assert cost[64] < 8 * 8 * 4, cost


def test_the_layer_is_the_same_with_chunks(runtime: Runtime) -> None:
    outputs = [
        sparse_layer(tiny(MoeConfig(num_experts=4, top_k=2, expert_chunk_rows=n)), runtime)(random(8, 2, 8))[0]
        for n in (None, 3)
    ]
    torch.testing.assert_close(*outputs)


class AddsToMain(Reference):
    """As backends on a GPU do: the gradient goes where Megatron-Core keeps it, and what is returned has no meaning."""

    def weight_gradient(self, x_RK: Any, dy_RN: Any, groups: Any, w: torch.Tensor) -> torch.Tensor:
        dw, main = super().weight_gradient(x_RK, dy_RN, groups, w), main_gradient(w)
        return dw if main is None else dw.mul_(main.add_(dw).new_tensor(torch.nan))


@pytest.mark.parametrize("rows", [(20, 60), (60, 20), (20, 60, 20), (60, 60)])
def test_gradients_of_micro_batches_add_up_whether_cut_or_not(rows: tuple[int, ...], runtime: Runtime) -> None:
    """At most 40 rows at a time. Megatron-Core's hook adds what autograd returns unless the weight says that it was
    done, which stays said for the whole step."""
    sums = []
    for gemm, limit in ((AddsToMain(), 40), (Reference(), None)):
        experts = Experts(
            tiny(MoeConfig(num_experts=4, expert_chunk_rows=limit)), backend=ExpertBackend.on(gemm),
            dtype=torch.float32, groups=runtime.groups,
        )  # fmt: skip
        initialise(experts.to(runtime.device), seed=1)
        weights = list(experts.parameters())
        for w in weights:
            w.main_grad, w.grad_added_to_main_grad = torch.zeros_like(w), False
        for seed, n in enumerate(rows):
            x_RD = random(n, 8, seed=seed).to(runtime.device).requires_grad_()
            experts(as_routed(x_RD), [n // 2, 0, n // 4, n // 4]).square().sum().backward()
            for w in weights:
                if not w.grad_added_to_main_grad:
                    w.main_grad += w.grad
                w.grad = None
        sums.append([w.main_grad for w in weights])
    for got, wanted in zip(*sums, strict=True):
        assert_close(got, wanted.cpu().double())
