"""Experts and linear layers on a GEMM backend: every product, its operands and its gradients, under every layout."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.parity import Outcome
from conf.model_schema import GATED_ACTIVATIONS
from conf.schema import ACTIVATIONS, MoeConfig, ParallelConfig
from ops.activations import activate
from ops.experts import ExpertBackend, loop_experts
from ops.fp8_numerics import RECIPES, Block, quantise
from ops.fused_experts import Window
from ops.gemm_backend import Reference, Weight
from ops.grouped_mlp import experts_with, forget_weights, kept_weight
from ops.permute import PermutedTokens, PermuteIndices
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_layer, sparse_layer, tiny
from tests.parallel.helpers import Variant, build_engine, measure, started, train
from tests.parallel.test_parity import relative

COUNTS = [3, 0, 130, 1]
BLOCKWISE = RECIPES["blockwise"]


def inputs(activation: str, dtype: torch.dtype, hidden: int = 160, width: int = 136) -> list[Tensor]:
    """x, w_in, w_out and b_in, no size of them a multiple of 128."""
    gates, experts = 2 if activation in GATED_ACTIVATIONS else 1, len(COUNTS)
    shapes = ((sum(COUNTS), hidden), (experts, hidden, gates, width), (experts, width, hidden), (experts, gates, width))
    sizes = (1, hidden**-0.5, width**-0.5, 0.3)
    made = zip(shapes, sizes, strict=True)
    return [(size * random(*s, seed=i)).to(dtype).requires_grad_() for i, (s, size) in enumerate(made)]


def kept(tensors: list[Tensor]) -> Tensor:
    """A dropout mask for the hidden width: a quarter is dropped."""
    x, _, w_out, _ = tensors
    return ((random(x.shape[0], w_out.shape[1], seed=8) > -0.67) / 0.75).to(x)


def results(backend: Any, activation: str, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of x, w_in, w_out and b_in, with dropout."""
    x, w_in, w_out, b_in = tensors
    out = backend(x, COUNTS, w_in, w_out, activation, b_in, kept(tensors))
    out.backward(random(*out.shape, seed=9).to(out))
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_recipe_the_experts_are_the_loop(activation: str) -> None:
    got, wanted = (
        results(backend, activation, inputs(activation, torch.float32))
        for backend in (experts_with(Reference()), loop_experts)
    )
    assert [relative(a, b) < 1e-6 for a, b in zip(got, wanted, strict=True)] == [True] * 5


def read_in_place(gemm: Any, tensors: list[Tensor], *, gathered: bool) -> list[Tensor]:
    """Output and gradients of SwiGLU experts on rows of 90 tokens with two choices each, of which 46 are dropped; a
    token with its row number is read where it lies, or all rows are gathered before."""
    x_TD, *weights = tensors
    x_TD = x_TD[:90].detach().requires_grad_()
    second = 2 * torch.randperm(90, generator=torch.Generator().manual_seed(0))[: sum(COUNTS) - 90] + 1
    every = torch.cat([2 * torch.arange(90), second])
    choice_R = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))].to(x_TD.device)
    permuted = PermutedTokens(x_TD, PermuteIndices(choice_R, 2))
    rows, more = (permuted.permute(), []) if gathered else (x_TD, [permuted.indices])
    out = experts_with(gemm)(rows, COUNTS, *weights[:2], "swiglu", None, None, *more)
    grad = random(*out.shape, seed=9).to(out)
    return [out.detach(), *torch.autograd.grad(out, (x_TD, *weights[:2]), grad)]


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("narrow", [False, True])
def test_rows_read_where_they_lie_are_the_gathered_rows(recipe: str | None, narrow: bool) -> None:
    gemm = Reference(recipe and RECIPES[recipe], narrow_weight_gradient=narrow)
    got, wanted = (read_in_place(gemm, inputs("swiglu", torch.float32), gathered=g) for g in (False, True))
    assert [relative(a, b) < 1e-6 for a, b in zip(got, wanted, strict=True)] == [True] * 4


def test_experts_that_read_in_place_keep_no_copy_of_the_rows(runtime: Runtime) -> None:
    """Bytes that a whole layer keeps for the backward pass, with two choices per token, none of them dropped."""
    model = tiny(MoeConfig(num_experts=4, top_k=2, capacity_factor=None), hidden_size=24)
    layer, kept = sparse_layer(model, runtime, backend=ExpertBackend.on(Reference())), []
    x_SBD = random(16, 2, 24).to(runtime.device)
    for permutes in (True, False):
        layer.experts.backend = dataclasses.replace(layer.experts.backend, permutes=permutes)
        memory: dict[int, int] = {}

        def keep(t: Tensor, memory: dict[int, int] = memory) -> Tensor:
            memory[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out_SBD = run_layer(layer, x_SBD)
        kept.append(sum(memory.values()))
    assert out_SBD.requires_grad and kept[1] - kept[0] == 64 * 24 * 4 - 64 * 8  # the rows, less their numbers


def by_hand(name: str, narrow: bool, activation: str, tensors: list[Tensor]) -> list[Tensor]:
    """The same in float64, one expert at a time, with each operand rounded as the recipe says."""
    recipe = RECIPES[name]

    def q(t: Tensor, block: Block) -> Tensor:
        return quantise(t, block).dequantise(torch.float64)

    def columns(t: Tensor) -> Tensor:
        return q(t, recipe.columns) if narrow else t

    x_RD, w_in, w_out, b_in = (t.detach().double() for t in tensors)
    keep_RF = kept(tensors).double()
    dy_RD, outs, dxs = random(*x_RD.shape, seed=9).double(), [], []
    dw_in, dw_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
    # One scale for all rows of a rank, where a recipe has no blocks.
    rows_x, rows_dy = (q(t, recipe.rows).split(COUNTS) for t in (x_RD, dy_RD))
    h_all = [r @ q(w.flatten(1), recipe.weight) + b.flatten() for r, w, b in zip(rows_x, w_in, b_in, strict=True)]
    h_RGF = torch.cat(h_all).unflatten(1, w_in.shape[2:]).requires_grad_()
    a_RF = activate(h_RGF.unbind(1), activation) * keep_RF
    da_RF = torch.cat([r @ q(w, recipe.weight_back).t() for r, w in zip(rows_dy, w_out, strict=True)])
    dh_RN = torch.autograd.grad(a_RF, h_RGF, da_RF)[0].flatten(1)
    rows_a, rows_dh = (q(t.detach(), recipe.rows).split(COUNTS) for t in (a_RF, dh_RN))
    whole = zip(*(t.detach().split(COUNTS) for t in (x_RD, a_RF, dy_RD, dh_RN)), strict=True)
    for e, (x, a, dy, dh) in enumerate(whole):
        outs.append(rows_a[e] @ q(w_out[e], recipe.weight))
        dxs.append(rows_dh[e] @ q(w_in[e].flatten(1), recipe.weight_back).t())
        if len(x):
            dw_in[e] = (columns(x).t() @ columns(dh)).view(w_in[e].shape)
            dw_out[e] = columns(a).t() @ columns(dy)
    db_in = torch.stack([dh.sum(0) for dh in dh_RN.split(COUNTS)]).view(b_in.shape)
    return [torch.cat(outs), torch.cat(dxs), dw_in, dw_out, db_in]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_every_operand_is_rounded_as_the_recipe_says(recipe: str, narrow: bool, activation: str) -> None:
    """In fp32, where hardly a value falls on the other side of a rounding because of what was added up before."""
    tensors = inputs(activation, torch.float32)
    gemm = Reference(RECIPES[recipe], narrow_weight_gradient=narrow)
    got, wanted = results(experts_with(gemm), activation, tensors), by_hand(recipe, narrow, activation, tensors)
    assert [relative(a, b) < 2e-4 for a, b in zip(got, wanted, strict=True)] == [True] * 5
    exact = results(loop_experts, activation, inputs(activation, torch.float32))
    assert all(relative(a, b) > 0.01 for a, b in zip(got, exact, strict=True))


def test_the_layer_stays_near_bf16() -> None:
    """Each product is within 0.04 of bf16's (test_numerics.py). One after the other their errors add up, and gate times
    up has both: 0.067 forward and 0.082 backward were seen."""
    exact = results(loop_experts, "swiglu", inputs("swiglu", torch.bfloat16, 256, 256))
    gemm = Reference(BLOCKWISE, narrow_weight_gradient=True)
    got = results(experts_with(gemm), "swiglu", inputs("swiglu", torch.bfloat16, 256, 256))
    assert all(0.03 < relative(a.float(), b.float()) < 0.09 for a, b in zip(got, exact, strict=True))


def test_a_weight_is_rounded_once_and_again_after_a_change() -> None:
    made = []

    class Counting(Reference):
        def weight(self, w_LKN: Tensor) -> Weight:
            made.append(w_LKN.clone())
            return super().weight(w_LKN)

    gemm, layer = Counting(BLOCKWISE), torch.nn.Linear(4, 4)
    for _ in range(2):
        kept_weight(gemm, layer.weight[None], layer.weight)
    assert len(made) == 1
    with torch.no_grad():
        layer.weight.mul_(2)  # autograd counts this one
    kept_weight(gemm, layer.weight[None], layer.weight)
    layer.weight.data.mul_(2)  # an optimizer on flat buffers writes like this
    forget_weights(layer)
    assert torch.equal(kept_weight(gemm, layer.weight[None], layer.weight).forward, quantised(layer.weight[None]))
    kept_weight(Reference(BLOCKWISE), layer.weight[None], layer.weight)
    assert len(made) == 3


def quantised(w: Tensor) -> Tensor:
    return quantise(w.detach(), BLOCKWISE.weight).dequantise(w.dtype)


SIZES = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 256, "num_query_groups": 4}
VARIANTS = {
    "plain": Variant(SIZES, {"every": 2}),
    "reference": Variant(SIZES, {"every": 2}, gemm=Reference()),
    "fp8": Variant(SIZES, {"every": 2}, gemm=Reference(BLOCKWISE)),
    "full": Variant(SIZES | {"recompute": ["full"]}, {"every": 2}, gemm=Reference(BLOCKWISE)),
    "activation": Variant(SIZES | {"recompute": ["activation", "norm"]}, {"every": 2}, gemm=Reference(BLOCKWISE)),
}


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Outcome]:
    return ranks.run(1, measure, ParallelConfig(), VARIANTS, timeout=120)[0]


def assert_same(got: Outcome, wanted: Outcome, tolerance: float, steps: int = 3) -> None:
    assert relative(got.losses[:steps], wanted.losses[:steps]) < tolerance
    assert np.array_equal(got.load_SLE[:steps], wanted.load_SLE[:steps])
    assert steps < 3 or relative(got.logits_V, wanted.logits_V) < tolerance
    differences = {key: relative(got.gradients[key], whole) for key, whole in wanted.gradients.items()}
    assert max(differences.values()) <= tolerance, differences


@pytest.mark.parametrize(
    "size, degrees",
    [(2, {"tp": 2}), (2, {"tp": 2, "sequence_parallel": True}), (4, {"ep": 2, "etp": 2, "tp": 2})],
    ids=str,
)
def test_linear_layers_keep_their_collectives(ranks, one_rank, size: int, degrees: dict[str, Any]) -> None:
    """Without a recipe every layout gives Megatron-Core's own products; with one, the rounding is the same too."""
    every = ranks.run(size, measure, ParallelConfig(**degrees), {k: VARIANTS[k] for k in ("reference", "fp8")})
    assert_same(every[0]["reference"], one_rank["plain"], 1e-5)
    # A value that falls on the other side of a rounding moves by up to a sixteenth, and in time takes others along.
    assert_same(every[0]["fp8"], one_rank["fp8"], 2e-3, steps=1)


@pytest.mark.parametrize("recompute", ["full", "activation"])
def test_recompute_computes_the_same(one_rank, recompute: str) -> None:
    assert_same(one_rank[recompute], one_rank["fp8"], 1e-6)


def test_fp8_is_not_bf16(one_rank) -> None:
    assert relative(one_rank["fp8"].logits_V, one_rank["plain"].logits_V) > 0.01
    assert_same(one_rank["reference"], one_rank["plain"], 1e-6)


class NoInputGradient(Reference):
    """The transposed product with another weight's values."""

    def weight(self, w_LKN: Tensor) -> Weight:
        weight = super().weight(w_LKN)
        return Weight(weight.forward, weight.back.flip(-1))


class HalfWeightGradient(Reference):
    """A weight gradient that misses every second row."""

    def columns(self, x_RK: Tensor, groups: list[Window], row_R: Tensor | None = None) -> tuple[Tensor]:
        x_RK = x_RK if row_R is None else x_RK[row_R]
        keep = torch.arange(x_RK.shape[0])[:, None] % 2
        return (x_RK * keep,)


def learn(world: World, variants: dict[str, Variant]) -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) of each of 20 steps on the same four micro-batches (rank function)."""
    with started(world, ParallelConfig()) as runtime:
        return {name: train(build_engine(runtime, variant), [0] * 20) for name, variant in variants.items()}


@pytest.fixture(scope="module")
def learned(ranks) -> dict[str, np.ndarray]:
    """In bf16, as training runs."""
    every = {
        "bf16": None,
        "fp8": Reference(BLOCKWISE),
        "narrow": Reference(BLOCKWISE, narrow_weight_gradient=True),
        "no input gradient": NoInputGradient(BLOCKWISE),
        "half a weight gradient": HalfWeightGradient(BLOCKWISE),
    }
    # Of some initial weights half a gradient is nearly enough: with seed 1 it drifts by 0.064.
    base = Variant({**SIZES, "hidden_size": 128, "ffn_hidden_size": 128}, dtype=torch.bfloat16, seed=2)
    variants = {name: dataclasses.replace(base, gemm=gemm) for name, gemm in every.items()}
    return {name: np.array(told) for name, told in ranks.run(1, learn, variants, timeout=120)[0].items()}


def drift(got: np.ndarray, wanted: np.ndarray) -> float:
    """The mean difference of the losses, relative to the first one."""
    return np.abs(got[:, 0] - wanted[:, 0]).mean() / wanted[0, 0]


def test_twenty_steps_in_fp8_are_twenty_steps_in_bf16(learned) -> None:
    """Of a model that learns eight sequences by heart, so that every gradient matters."""
    assert learned["bf16"][-1, 0] < 0.05 * learned["bf16"][0, 0]
    assert drift(learned["fp8"], learned["bf16"]) < 0.03
    assert drift(learned["narrow"], learned["bf16"]) < 0.03


@pytest.mark.parametrize("broken", ["no input gradient", "half a weight gradient"])
def test_twenty_steps_tell_a_broken_gradient(learned, broken: str) -> None:
    assert drift(learned[broken], learned["bf16"]) > 0.08
