"""The experts' products and the choice among them."""

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conf.schema import ACTIVATIONS, ModelConfig, MoeConfig
from models.init import initialise
from models.megatron_config import transformer_config
from moe.mlp import MLP
from ops import experts
from ops.activations import activate
from ops.cpp import build as native
from ops.experts import EXPERTS, loop_experts
from ops.fused_experts import FusedExperts, repeating_size, windows
from ops.operation import Row
from ops.registry import examine
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import (
    IN_FP32,
    assert_close,
    assert_gradients_close,
    expert_backend,
    in_float64,
    random,
    run_context,
    selected,
    tiny,
    try_on,
)
from tests.stand_ins import installed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("relu", [0.0, 2.0]),
        ("relu2", [0.0, 4.0]),
        ("gelu", [-0.5 * (1 - math.erf(0.5**0.5)), 1 + math.erf(2**0.5)]),
        ("swiglu", [3 * -1 / (1 + math.e), 5 * 2 / (1 + math.exp(-2))]),
        ("geglu", [3 * -0.5 * (1 - math.erf(0.5**0.5)), 5 * (1 + math.erf(2**0.5))]),
    ],
)
def test_activations_by_hand(name: str, wanted: list[float]) -> None:
    """h or gate = (-1, 2), up = (3, 5)."""
    parts = [torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 5.0])]
    got = activate(parts if name.endswith("glu") else parts[:1], name)
    assert got.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.fixture
def transformer_engine() -> Iterator[None]:
    with installed("transformer_engine"):
        yield


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("backend", [name for name in IN_FP32 if name != "triton"])  # tests/ops
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias and dropout"])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 0, 0, 6], [6, 0, 0, 0], [0, 0, 0, 0]])
def test_rows_go_to_their_expert_whatever_the_counts(
    counts: list[int], extras: bool, backend: str, runtime: Runtime
) -> None:
    """Also with no row at all, as on a rank whose experts nobody chose: its weights get a gradient of zeros, which
    the gradient buckets wait for."""
    if backend == "grouped_mm_fused":
        pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    x_RD, w_in, w_out, b_in = (
        random(*shape, seed=i) for i, shape in enumerate(((sum(counts), 8), (4, 8, 2, 4), (4, 4, 8), (4, 2, 4)))
    )
    keep_RF = (random(sum(counts), 4, seed=4) > 0) * 2.0
    wanted64 = [t.double().requires_grad_() for t in (x_RD, w_in, w_out, b_in)]
    mine = [t.to(runtime.device).requires_grad_() for t in (x_RD, w_in, w_out, b_in)]
    expert_R = [e for e, n in enumerate(counts) for _ in range(n)]
    x64, in64, out64, bias64 = wanted64
    rows = []
    for r, e in enumerate(expert_R):
        more = ((list(bias64[e]), torch.zeros(8)), keep_RF[r].double()) if extras else ()
        rows.append(reference.feed_forward(x64[r], [in64[e, :, 0], in64[e, :, 1]], out64[e], "swiglu", *more))
    wanted_RD = torch.stack(rows) if rows else x64 * 1
    wanted_RD.square().sum().backward()
    more = (mine[3], keep_RF.to(runtime.device)) if extras else ()
    out_RD = expert_backend(backend).run(mine[0], counts, *mine[1:3], "swiglu", *more)
    out_RD.square().sum().backward()
    assert out_RD.shape == x_RD.shape
    if rows:
        assert_close(out_RD, wanted_RD)
        assert_close(mine[0].grad, x64.grad)
    for got, wanted in list(zip(mine[1:], wanted64[1:], strict=True))[: 3 if extras else 2]:
        assert_close(got.grad, torch.zeros_like(wanted) if wanted.grad is None else wanted.grad)


def row_of(runtime: Runtime, model: ModelConfig, dtype: torch.dtype, device: torch.device = CPU) -> Row:
    return selected(EXPERTS, run_context(model, runtime, dtype, device))[1]


def asked_for(backend: str, **sizes: int) -> ModelConfig:
    return tiny(MoeConfig(num_experts=4, backend=backend), **sizes)


def test_transformer_engine_is_for_bf16_on_a_gpu_where_it_imports(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_on(runtime.device, EXPERTS, monkeypatch)
    with pytest.raises(ValueError, match=r"backend=te computes in bf16, this run in torch.float32\."):
        row_of(runtime, asked_for("te"), torch.float32, CUDA)
    with pytest.raises(ValueError, match="backend=te needs a GPU"):
        row_of(runtime, asked_for("te"), torch.bfloat16)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match="backend=te needs the package transformer-engine, which is not installed"):
        row_of(runtime, asked_for("te"), torch.bfloat16, CUDA)
    assert "te " not in row_of(runtime, asked_for("auto"), torch.bfloat16, CUDA).why


EXTRAS = {"plain": (), "bias": ("b_in",), "dropout": ("keep",), "both": ("b_in", "keep")}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_written_by_hand_are_those_of_finite_differences(activation: str, extras: str) -> None:
    gates = 2 if activation.endswith("glu") else 1
    shapes = ((5, 3), (3, 3, gates, 2), (3, 2, 3), (3, gates, 2))
    inputs = [random(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    keep_RF = (random(5, 2, seed=9) > 0) * 2.0 if "keep" in EXTRAS[extras] else None
    with_bias = "b_in" in EXTRAS[extras]

    def run(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None) -> Tensor:
        return FusedExperts.apply(x, [2, 0, 3], w_in, w_out, activation, b_in, keep_RF)

    assert torch.autograd.gradcheck(run, inputs if with_bias else inputs[:3])


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("counts", [[37, 0, 70, 5, 1], [3, 0, 2, 0, 120], [90, 20, 0, 0, 0], [0, 1, 0, 16, 2]])
def test_rows_beyond_an_expert_leave_no_trace(counts: list[int], activation: str) -> None:
    """In bf16 a product runs on a rounded number of rows, neighbours' rows among them; with bias and dropout, against
    the loop in fp64, whose products are of the expert's own rows."""
    gates, total = 2 if activation.endswith("glu") else 1, sum(counts)
    shapes = ((total, 16), (5, 16, gates, 8), (5, 8, 16), (5, gates, 8), (total, 8))
    x_RD, w_in, w_out, b_in, keep_RF = (random(*shape, seed=i).bfloat16() for i, shape in enumerate(shapes))
    keep_RF = (keep_RF > 0).bfloat16()
    results = []
    for backend, dtype in ((FusedExperts.apply, torch.bfloat16), (loop_experts, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x_RD, w_in, w_out, b_in)]
        out = backend(inputs[0], counts, inputs[1], inputs[2], activation, inputs[3], keep_RF.to(dtype))
        out.backward(random(total, 16, seed=9).to(dtype))
        results.append([out.detach(), *(t.grad for t in inputs)])
    for got, wanted in zip(*results, strict=True):
        # By row and by expert. Rounding gives up to 0.036; a neighbour's row in a sum over 70 gives more than 0.1.
        parts = zip(got.split(1), wanted.split(1), strict=True)
        worst = max((((g - w).norm() / w.norm().clamp(min=1e-2)).item() for g, w in parts), default=0.0)
        assert worst < 0.05


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=9))
def test_windows_hold_their_expert_and_have_few_sizes(counts: list[int]) -> None:
    start = 0
    for n, at in zip(counts, windows(counts, rounded=True), strict=True):
        assert (at.start, at.stop) == (start, start + n)
        assert 0 <= at.first <= at.start and at.stop <= at.last <= sum(counts)
        size = at.last - at.first
        assert size in (n, repeating_size(n)) and (size == n or size < n + max(16, n / 8))
        start += n
    assert len({repeating_size(n) for n in range(1, 4097)}) == 16 + 16 * 4
    assert list(windows(counts, rounded=False)) == [(a.start, a.stop, a.start, a.stop) for a in windows(counts, True)]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias and dropout"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_operation_gives_the_bits_of_the_loop(activation: str, extras: bool) -> None:
    """In bf16, where a product in another precision or order would show."""
    gates = 2 if activation.endswith("glu") else 1
    shapes = ((6, 16), (4, 16, gates, 8), (4, 8, 16), (4, gates, 8))
    keep_RF = ((random(6, 8, seed=9) > 0) * 1.25).bfloat16()
    results = []
    for backend in (loop_experts, FusedExperts.apply):
        inputs = [random(*shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate(shapes)]
        more = (inputs[3], keep_RF) if extras else ()
        out = backend(inputs[0], [1, 3, 0, 2], *inputs[1:3], activation, *more)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in inputs[: 4 if extras else 3])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_layer_equals_the_reference(activation: str, runtime: Runtime) -> None:
    model = tiny(activation=activation)
    layer = MLP(model, transformer_config(model, runtime, torch.float32, deterministic=False), runtime.groups)
    initialise(layer.to(runtime.device), seed=1)
    x_SBD, weights = random(3, 2, 8), in_float64(layer)
    wanted = torch.stack(
        [reference.dense_layer(x_D, weights, activation) for x_D in x_SBD.double().flatten(0, 1)]
    ).view(3, 2, 8)
    wanted.square().sum().backward()
    out_SBD = layer(x_SBD.to(runtime.device))
    out_SBD.square().sum().backward()
    assert_close(out_SBD, wanted)
    assert_gradients_close(layer, weights)


def test_expert_weights_get_their_gradient_without_a_copy_of_all_experts() -> None:
    """w[e] in a loop makes autograd write zeros of the size of all experts for each of them: time and memory grow with
    the square of their number."""
    weights = [t.requires_grad_() for t in (random(64, 8, 1, 4), random(64, 4, 8))]
    out = loop_experts(random(64, 8), [1] * 64, *weights, "relu")
    with torch.profiler.profile(profile_memory=True) as profile:
        out.sum().backward()
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated < 20 * sum(w.numel() * 4 for w in weights)


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "hidden", "chosen"),
    [
        ("loop", CUDA, torch.bfloat16, 64, "loop"),
        ("grouped_mm", CPU, torch.float32, 64, "grouped_mm"),
        ("fused", CUDA, torch.bfloat16, 64, "fused"),
        ("auto", CPU, torch.float32, 64, "fused"),
        ("auto", CPU, torch.bfloat16, 64, "fused"),
        ("auto", CUDA, torch.bfloat16, 64, "grouped_mm"),
        ("auto", CUDA, torch.float32, 64, "loop"),
        ("auto", CUDA, torch.bfloat16, 60, "loop"),  # 120 bytes: rows would not be aligned
    ],
)
def test_backend_fits_device_and_precision(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    chosen: str,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor without AVX512-BF16."""
    try_on(runtime.device, EXPERTS, monkeypatch)  # there may be no GPU to try it on
    monkeypatch.setattr(native, "missing_instructions", lambda: ["avx512_bf16"])
    assert row_of(runtime, asked_for(wanted, hidden_size=hidden, ffn_hidden_size=64), dtype, device).name == chosen


@pytest.mark.parametrize("sizes", [{"hidden_size": 60}, {"ffn_hidden_size": 60, "hidden_size": 64}])
def test_grouped_products_refuse_rows_that_are_not_aligned(sizes: dict[str, int], runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"backend=grouped_mm .* 60 values .*backend=loop"):
        row_of(runtime, asked_for("grouped_mm", **sizes), torch.bfloat16)


def test_grouped_products_are_tried_with_an_expert_without_rows(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs where the weight gradient of an expert without rows is whatever lay in memory (pytorch#172439)."""
    right, sizes = experts.torch_grouped_product, {"hidden_size": 64, "ffn_hidden_size": 64}

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w_LKN: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(empty)
            return w_LKN.view_as(w_LKN)

        @staticmethod
        def backward(ctx: Any, grad_LKN: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad_LKN.masked_fill(ctx.saved_tensors[0][:, None, None], 1.0), None

    def product(x: torch.Tensor, w: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return right(x, Wrong.apply(w, torch.tensor(counts) == 0), counts)

    auto = run_context(asked_for("auto", **sizes), runtime, device=CPU)
    assert "grouped_mm" in examine(EXPERTS, auto).verified
    monkeypatch.setattr(experts, "grouped_experts", partial(experts.experts_by, product))
    assert "grouped_mm" not in examine(EXPERTS, auto).verified
    with pytest.raises(ValueError, match=r"grouped_mm differs from the reference by .*backend=loop"):
        row_of(runtime, asked_for("grouped_mm", **sizes), torch.float32)
    try_on(runtime.device, EXPERTS, monkeypatch)
    row = row_of(runtime, asked_for("auto", **sizes), torch.bfloat16, CUDA)
    assert row.name == "loop" and "grouped_mm differs from the reference" in row.why and row.refused
