"""The router in Triton against loops in float64 and against torch's operations.

Legend: T tokens, E experts, K choices per token, B sequences.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig, MoeConfig
from moe.layer import MoELayer
from moe.router import ROUTE, Router
from ops.implementations import Ops
from ops.operation import Row
from ops.registry import largest_difference
from ops.routing import RouterStats, Routing, Rule
from parallel.batch_context import TRAIN, BatchContext
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import (
    assert_close,
    force_experts,
    random,
    run_context,
    run_layer,
    selected,
    sparse_layer,
    tiny,
    try_on,
)

pytestmark = pytest.mark.usefixtures("poisoned")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIGMOID = {"score_function": "sigmoid"}
CASES = {
    "switch": ({"num_experts": 8, "top_k": 1}, 1, 1),
    "several blocks": ({"num_experts": 8, "top_k": 2, "renormalize": False}, 300, 1),
    "all experts": ({"num_experts": 8, "top_k": 8, **SIGMOID}, 37, 1),
    "a single expert": ({"num_experts": 1, "top_k": 1}, 5, 1),
    "mixtral": ({"num_experts": 60, "top_k": 2, "softmax_order": "after", "routed_scaling_factor": 2.5}, 37, 1),
    "raw sigmoids": ({"num_experts": 60, "top_k": 8, "renormalize": False, **SIGMOID}, 50, 1),
    "more blocks than programs": ({"num_experts": 128, "top_k": 8}, 131, 1),
    "sequences": ({"num_experts": 60, "top_k": 2, "load_balancing": "seq_aux_loss"}, 150, 3),
    "bias": ({"num_experts": 128, "top_k": 2, "bias_update_rate": 0.1, "routed_scaling_factor": 2.5, **SIGMOID}, 20, 2),
    "bias of softmax": ({"num_experts": 8, "top_k": 1, "bias_update_rate": 0.1}, 20, 1),
}


def router_with_kernel(moe: MoeConfig, runtime: Runtime) -> Router:
    from ops.triton.router import route

    built = Router(
        ModelConfig(hidden_size=8, moe=moe), sequence_parallel=False, groups=runtime.groups, ops=Ops(route=route)
    )
    if built.bias is not None:
        built.bias.data = 0.1 * random(moe.num_experts, seed=9)
    return built.to(runtime.device)


def loop(logits_TE: Tensor, moe: MoeConfig, bias_E: Tensor | None, padding_T: Tensor, sequences: int) -> Routing:
    """In float64, one token at a time, from the formulas in tests/moe/reference.py."""
    none, zero = moe.num_experts, 0 * logits_TE.sum()  # with a gradient where all is padding
    gates, experts, z, entropy, square = [], [], zero, zero, zero
    loads, sums = ([[zero] * moe.num_experts for _ in range(sequences)] for _ in range(2))
    for t, logits_E in enumerate(logits_TE):
        if padding_T[t]:
            gates.append(0 * logits_E[: moe.top_k])
            experts.append([none] * moe.top_k)
            continue
        probs_E, chosen, weights = reference.route(logits_E, moe, 0.0 if bias_E is None else bias_E)
        gates.append(torch.stack(weights))
        experts.append(chosen)
        b = t % sequences
        loads[b] = [load + (e in chosen) for e, load in enumerate(loads[b])]
        sums[b] = [total + p for total, p in zip(sums[b], probs_E, strict=True)]
        z = z + reference.z_loss(logits_E[None])
        entropy = entropy - torch.special.xlogy(probs_E, probs_E).sum()
        square = square + (logits_E**2).mean()
    load_BE, probs_BE = (torch.stack([torch.stack(row) for row in table]) for table in (loads, sums))
    stats = RouterStats(load_BE.long(), probs_BE, z, entropy, square)
    return Routing(torch.stack(gates), torch.tensor(experts), stats, logits_TE)


def gradient(routing: Routing, logits_TE: Tensor) -> Tensor:
    """What reaches the logits of random gradients, those of the gates strided."""
    gates_TK, router_stats = routing.gates_TK, routing.router_stats
    dgates_TK, dprobs_BE = random(*gates_TK.shape[::-1], seed=1).t(), random(*router_stats.probs_BE.shape, seed=2)
    above = [t.to(gates_TK) for t in (dgates_TK, dprobs_BE, torch.tensor(0.05))]
    return torch.autograd.grad((gates_TK, router_stats.probs_BE, router_stats.z), logits_TE, above)[0]


def assert_equal_the_loop(moe: MoeConfig, logits_TE: Tensor, padding_T: Tensor, sequences: int, runtime: Runtime):
    """Forward and backward; the values of padding must not matter."""
    kernel = router_with_kernel(moe, runtime)
    leaf = logits_TE.masked_fill(padding_T[:, None], torch.nan).to(runtime.device).requires_grad_()
    padding = padding_T.to(runtime.device) if padding_T.any() else None
    got = kernel.route(leaf, padding, TRAIN, sequences)
    exact = logits_TE.double().requires_grad_()
    bias_E = None if kernel.bias is None else kernel.bias.detach().cpu().double()
    wanted = loop(exact, moe, bias_E, padding_T, sequences)
    assert got.experts_TK.tolist() == wanted.experts_TK.tolist()
    assert got.router_stats.load_BE.tolist() == wanted.router_stats.load_BE.tolist()
    assert_close(got.gates_TK, wanted.gates_TK)
    for name in ("probs_BE", "z", "entropy", "logit_square"):
        assert_close(getattr(got.router_stats, name), getattr(wanted.router_stats, name))
    dlogits_TE = gradient(got, leaf)
    assert_close(dlogits_TE, gradient(wanted, exact))
    assert not dlogits_TE[padding_T.to(runtime.device)].any()


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_loop_in_float64(
    case: tuple[dict[str, Any], int, int], padded: bool, runtime: Runtime, device: torch.device
) -> None:
    """Logits are strided; with padding a whole sequence of three has no token."""
    settings, tokens, sequences = case
    moe, padding_T = MoeConfig(**settings), torch.zeros(tokens, dtype=torch.bool)
    if padded:
        padding_T[::3] = padding_T[-2:] = True
    logits_TE = 2 * random(moe.num_experts, tokens).t()
    assert_equal_the_loop(moe, logits_TE, padding_T, sequences, runtime)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ties_go_to_the_lower_expert(after: bool, runtime: Runtime, device: torch.device) -> None:
    """60 logits of seven values, zero with either sign."""
    moe = MoeConfig(num_experts=60, top_k=8, softmax_order="after" if after else "before")
    logits_TE = random(20, 60).mul(2).round().clamp(-3, 3)
    assert (logits_TE == 0).any() and logits_TE[0].unique().numel() <= 7
    logits_TE[::2] *= -1
    assert_equal_the_loop(moe, logits_TE, torch.zeros(20, dtype=torch.bool), 1, runtime)


def test_no_tokens(runtime: Runtime, device: torch.device) -> None:
    kernel = router_with_kernel(MoeConfig(num_experts=8, top_k=2), runtime)
    logits_TE = torch.zeros(0, 8, device=runtime.device, requires_grad=True)
    routing = kernel.route(logits_TE, None, TRAIN, 2)
    assert routing.gates_TK.shape == routing.experts_TK.shape == (0, 2)
    for name, tally in vars(routing.router_stats).items():
        assert tally.shape == ((2, 8) if "BE" in name else ()) and not tally.any()
    assert gradient(routing, logits_TE).shape == (0, 8)


def test_everything_is_padding(runtime: Runtime, device: torch.device) -> None:
    moe = MoeConfig(num_experts=8, top_k=2, softmax_order="after")
    assert_equal_the_loop(moe, random(9, 8), torch.ones(9, dtype=torch.bool), 3, runtime)


def test_what_is_no_number_is_sorted_as_torch_does(runtime: Runtime, device: torch.device) -> None:
    """Logits of a run that diverges must not name an expert twice, or one that there is none of."""
    huge = 3e38
    row = [torch.nan, -torch.inf, torch.inf, -huge, huge, -torch.nan, 0.0, -0.0]
    logits_TE = torch.tensor(
        [row, row[::-1], [torch.nan] * 8, [-torch.inf] * 8, [torch.inf] * 8], device=runtime.device
    )
    for moe in (MoeConfig(num_experts=8, top_k=8, softmax_order="after"), MoeConfig(num_experts=8, top_k=3)):
        kernel = router_with_kernel(moe, runtime)
        got = kernel.route(logits_TE, None, TRAIN, 1).experts_TK
        kernel.ops = Ops()
        assert torch.equal(got, kernel.route(logits_TE, None, TRAIN, 1).experts_TK)


def test_scores_that_underflow(runtime: Runtime, device: torch.device) -> None:
    """Probabilities far below what fp32 holds; the loop has them all."""
    logits_TE = torch.tensor([[0.0, -90, -300, -200], [500, 500, -500, 0], [-95, -100, -99, -103]])
    no_padding_T = torch.zeros(3, dtype=torch.bool)
    assert_equal_the_loop(MoeConfig(num_experts=4, top_k=2, softmax_order="after"), logits_TE, no_padding_T, 1, runtime)
    kernel = router_with_kernel(MoeConfig(num_experts=4, top_k=2, score_function="sigmoid"), runtime)
    leaf = torch.full((1, 4), -800.0, device=runtime.device, requires_grad=True)
    routing = kernel.route(leaf, None, TRAIN, 1)
    # Sums of sigmoids are formed in log space: what is alike gets alike, however small.
    assert routing.gates_TK.tolist() == [[0.5, 0.5]] and routing.router_stats.probs_BE.tolist() == [[0.25] * 4]
    assert gradient(routing, leaf).isfinite().all()


@pytest.mark.parametrize("name", ["switch", "all experts", "raw sigmoids", "mixtral", "bias of softmax"])
def test_equals_torchs_operations(name: str, runtime: Runtime, device: torch.device) -> None:
    """What a run tries at its start."""
    from ops.triton.router import route

    model = ModelConfig(hidden_size=8, moe=MoeConfig(**CASES[name][0]))
    context = run_context(model, runtime)
    got, wanted = (ROUTE.trial(kernel, context) for kernel in (route, None))
    assert largest_difference(got, wanted) < 1e-6


def layer_with(fused: bool, moe: MoeConfig, runtime: Runtime, recompute: bool) -> MoELayer:
    from ops.triton.router import route

    layer = sparse_layer(tiny(moe, recompute=["moe"] if recompute else []), runtime)
    layer.router.ops = Ops(route=route if fused else None)
    return layer


def passed(layer: MoELayer, x_SBD: Tensor, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Everything that a forward and backward pass leaves."""
    padding_BS = torch.arange(x_SBD.shape[0] * x_SBD.shape[1]).view(-1, x_SBD.shape[0]).to(x_SBD.device) % 5 == 3
    out_SBD = run_layer(layer, x_SBD, BatchContext(padding_BS=padding_BS, loss_scale=0.5))
    between()
    out_SBD.square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out_SBD.detach(), **gradients, **{n: b.clone() for n, b in layer.named_buffers()}}


@pytest.mark.parametrize("load_balancing", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_a_layer_is_the_same_and_so_is_recompute(load_balancing: str, runtime: Runtime, device: torch.device) -> None:
    moe = MoeConfig(num_experts=4, top_k=2, load_balancing=load_balancing, aux_loss_coeff=0.5, z_loss_coeff=0.2)
    x_SBD = random(10, 3, 8).to(runtime.device)
    plain, kernel, again = (
        passed(layer_with(fused, moe, runtime, recompute), x_SBD)
        for fused, recompute in ((False, False), (True, False), (True, True))
    )
    assert plain.keys() == kernel.keys() == again.keys()
    for name, value in plain.items():
        assert_close(kernel[name], value.double())
        assert torch.equal(again[name], kernel[name]), name


def test_a_near_tie_is_not_decided_again(runtime: Runtime, device: torch.device) -> None:
    """As in test_activation_checkpoint.py: between the passes the router changes so little that only ties notice."""
    moe = MoeConfig(num_experts=2, capacity_factor=None, aux_loss_coeff=0.5)
    found = []
    for recompute in (False, True):
        layer = layer_with(True, moe, runtime, recompute)
        x_SBD = force_experts(layer, random(6, 1, 8), [0] * 6).to(runtime.device)
        layer.router.weight.data.zero_()
        layer.router.weight.data[0, 0] = 1e-5

        def nudge(layer: MoELayer = layer) -> None:
            layer.router.weight.data[0, 0] -= 2e-5

        found.append(passed(layer, x_SBD, nudge))
        assert layer.router(x_SBD.flatten(0, 1)).experts_TK.tolist() == [[1]] * 6  # the nudge turns every token round
    plain, again = found
    assert not again["experts.w_in"][1].any() and again["experts.w_in"][0].any()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-6)


@pytest.fixture
def pretended_gpu(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run where the tests do."""
    try_on(runtime.device, ROUTE, monkeypatch)


def chosen(moe: MoeConfig, runtime: Runtime, device: torch.device = CUDA) -> tuple[object, Row]:
    return selected(ROUTE, run_context(ModelConfig(hidden_size=8, moe=moe), runtime, device=device))


def test_a_gpu_gets_the_kernel_where_it_serves(runtime: Runtime, pretended_gpu: None, device: torch.device) -> None:
    from ops.triton.router import route

    plain = MoeConfig(num_experts=8, top_k=2)
    kernel, row = chosen(plain, runtime)
    assert kernel is route and (row.operation, row.name) == ("router", "Triton") and "equals torch's" in row.why
    for settings, why in [
        ({"load_balancing": "sinkhorn"}, "sinkhorn chooses over the whole micro-batch"),
        ({"load_balancing": "expert_choice"}, "expert_choice chooses over the whole micro-batch"),
        (
            {"num_expert_groups": 2},
            "it chooses groups of experts first; "
            "TransformerEngine scores groups by logits where it divides gates by their sum",
        ),
    ]:
        kernel, row = chosen(replace(plain, **settings), runtime)
        assert kernel is None and row.name == "torch" and row.why.endswith(why) and not row.refused
    kernel, row = chosen(replace(plain, num_experts=5000), runtime)
    assert kernel is None and "Triton failed its trial (ValueError" in row.why and row.refused


def test_a_cpu_gets_torch(runtime: Runtime) -> None:
    kernel, row = chosen(MoeConfig(num_experts=8), runtime, CPU)
    assert kernel is None and (row.operation, row.name) == ("router", "torch")
    assert row.why == "softmax, a stable sort, sums"


def off(routing: Routing, name: str) -> Routing:
    """With one result a little wrong."""
    if name == "experts_TK":
        return replace(routing, experts_TK=routing.experts_TK.flip(1))
    if name == "gates_TK":
        return replace(routing, gates_TK=routing.gates_TK * 1.001)
    if name == "gradient":
        gates_TK = routing.gates_TK
        return replace(routing, gates_TK=gates_TK.detach() + 1.001 * (gates_TK - gates_TK.detach()))
    wrong = {name: getattr(routing.router_stats, name) + 1}
    return replace(routing, router_stats=replace(routing.router_stats, **wrong))


@pytest.mark.parametrize(
    "name",
    ["experts_TK", "gates_TK", "gradient", "load_BE", "probs_BE", "z", "entropy", "logit_square"],
)
def test_a_kernel_that_is_off_is_left_out(
    name: str, runtime: Runtime, pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    moe = MoeConfig(num_experts=8, top_k=2)
    torchs = Router(ModelConfig(hidden_size=8, moe=moe), sequence_parallel=False, groups=runtime.groups)

    def wrong(logits_TE: Tensor, bias_E: None, padding_T: Tensor, rule: Rule, sequences: int) -> Routing:
        return off(torchs.route(logits_TE, padding_T, TRAIN, sequences), name)

    monkeypatch.setattr("ops.triton.router.route", wrong)
    kernel, row = chosen(moe, runtime)
    assert kernel is None and "Triton differs from torch's by" in row.why and row.refused
