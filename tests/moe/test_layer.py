"""The sparse layer as a whole against the float64 reference, and the faults that users of other trainers report."""

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from conf.schema import ACTIVATIONS, DROP_POLICIES, LOAD_BALANCING, MoeConfig
from moe.counter_rng import key, uniform
from moe.layer import MoELayer
from ops.activations import IN_KERNELS
from parallel.batch_context import EVALUATE, GENERATE, TRAIN, BatchContext
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import (
    BACKENDS_THAT_RUN,
    EVERY_BACKEND,
    assert_close,
    assert_gradients_close,
    force_experts,
    in_float64,
    random,
    randomise_biases,
    run_layer,
    sparse_layer,
    tiny,
)

LOSS_SCALE = 0.37


def compare(
    layer: MoELayer, x_SBD: Tensor, activation: str, padding_BS: Tensor | None = None
) -> reference.Sparse | None:
    """Forward and backward of both, with a random gradient from above; everything to 1e-5. The reference sees the
    tokens that are no padding; None is returned when there are none."""
    moe, (seed, number) = layer.moe, layer.draws
    tokens, batch = x_SBD.shape[0] * x_SBD.shape[1], x_SBD.shape[1]
    real = [t for t in range(tokens) if padding_BS is None or not padding_BS[t % batch, t // batch]]
    noise_TD = 1 + moe.jitter * (
        2 * uniform(key(seed, "jitter", 7, 2, number), torch.arange(tokens), x_SBD.shape[2]) - 1
    )
    draws_TK = uniform(key(seed, "drop", 7, 2, number), torch.arange(tokens), moe.top_k)

    weights = in_float64(layer)
    x64_SBD = x_SBD.detach().cpu().double().requires_grad_()
    above_SBD = random(*x_SBD.shape, seed=99)
    # Only shared experts take care of padding: for them it is like any token.
    shared = [
        reference.shared_experts(x_D, reference.under(weights, "shared."), activation) for x_D in x64_SBD.flatten(0, 1)
    ]
    wanted, out_TD = None, torch.stack(shared) if shared else torch.zeros_like(x64_SBD.flatten(0, 1))
    aux = z = torch.zeros((), dtype=torch.float64)
    if real:
        wanted = reference.sparse_layer(
            x64_SBD.flatten(0, 1)[real],
            weights,
            moe,
            activation,
            moe.capacity_factor,
            [t % batch for t in real],
            noise_TD=noise_TD[real].double(),
            priority=draws_TK[real].tolist() if moe.drop_policy == "random" else None,
        )
        out_TD, aux, z = out_TD.index_copy(0, torch.tensor(real), wanted.out_TD), wanted.aux_loss, wanted.z_loss
    balanced = moe.load_balancing in ("sinkhorn", "expert_choice")
    losses = (0.0 if balanced else moe.aux_loss_coeff) * aux + moe.z_loss_coeff * z
    total = (out_TD.view(x_SBD.shape) * above_SBD).sum() + LOSS_SCALE * losses
    if total.requires_grad:
        total.backward()

    device = layer.router.weight.device
    x_SBD = x_SBD.to(device).requires_grad_()
    padding_BS = None if padding_BS is None else padding_BS.to(device)
    batch_ctx = BatchContext(loss_scale=LOSS_SCALE, step=7, micro_batch=2, padding_BS=padding_BS)
    out_SBD = run_layer(layer, x_SBD, batch_ctx)
    out_SBD.backward(above_SBD.to(device))

    assert_close(out_SBD, out_TD.view(x_SBD.shape))
    total = layer.statistics.sum_of
    assert total("aux_loss") == pytest.approx(aux.item(), rel=1e-5)
    assert total("z_loss") == pytest.approx(z.item(), rel=1e-5)
    kept = wanted.kept if wanted else []
    assert total("tokens") == len(real) and total("unserved_fraction") == sum(not any(row) for row in kept)
    assert total("dropped_fraction") == sum(not fits for row in kept for fits in row)
    chosen = [e for row in (wanted.experts if wanted else []) for e in row]
    assert layer.statistics.load_E.tolist() == [chosen.count(e) for e in range(moe.num_experts)]
    assert_close(x_SBD.grad, x64_SBD.grad)
    summands = {}
    if shared and x_SBD.numel():
        # The gate's gradient sums a token's products of answer and gradient from above, each times the token.
        products_TD = torch.stack(shared) * above_SBD.flatten(0, 1)
        summands["shared.gate"] = (products_TD.abs().amax(1) * x64_SBD.flatten(0, 1).abs().amax(1)).max().item()
    assert_gradients_close(layer, weights, summands)
    return wanted


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference(activation: str, backend: str, runtime: Runtime) -> None:
    if backend in ("triton", "grouped_mm_fused") and activation not in IN_KERNELS:
        pytest.skip("Triton has no such activation")
    moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=1.0, aux_loss_coeff=0.5, z_loss_coeff=0.2)
    layer = sparse_layer(tiny(moe, activation=activation), runtime, backend=backend)
    wanted = compare(layer, random(5, 2, 8, seed=3), activation)
    fates = [(e, kept) for pair in zip(wanted.experts, wanted.kept, strict=True) for e, kept in zip(*pair, strict=True)]
    loads = {fates.count((e, True)) for e in range(4)}
    assert len(loads) > 1 and len(set(fates)) > 4, "the case should drop something and load experts unevenly"


CASES = st.fixed_dictionaries(
    {
        "sequence": st.integers(0, 5),
        "batch": st.integers(1, 3),
        "hidden": st.sampled_from((8, 12)),
        "ffn": st.sampled_from((4, 8)),
        "num_experts": st.integers(2, 6),
        "top_k": st.integers(1, 3),
        "renormalize": st.sampled_from((None, False)),
        "scores": st.sampled_from(("before", "after", "sigmoid")),
        "groups": st.sampled_from((1, 1, 2, 3)),
        "routed_scaling_factor": st.sampled_from((1.0, 0.5)),
        "capacity_factor": st.sampled_from((None, 0.1, 0.5, 1.0, 1.1, 1.25)),
        "drop_policy": st.sampled_from(DROP_POLICIES),
        "load_balancing": st.sampled_from(LOAD_BALANCING),
        "jitter": st.sampled_from((0.0, 0.0, 0.3)),
        "padding": st.sampled_from(("none", "none", "some", "all")),
        "activation": st.sampled_from(IN_KERNELS),
        "backend": st.sampled_from(BACKENDS_THAT_RUN),
        "bias": st.booleans(),
        "expert_bias": st.booleans(),
        "pad": st.booleans(),
        "gate_on": st.just("output"),
        "shared": st.sampled_from((None, "plain", "gated")),
        "routing": st.sampled_from(("random", "collapsed", "tied")),
        "seed": st.integers(0, 1000),
    }
)
PLAIN: dict[str, Any] = {
    "sequence": 3,
    "batch": 2,
    "hidden": 8,
    "ffn": 4,
    "num_experts": 4,
    "top_k": 1,
    "renormalize": None,
    "scores": "before",
    "groups": 1,
    "routed_scaling_factor": 1.0,
    "capacity_factor": None,
    "drop_policy": "position",
    "load_balancing": "aux_loss",
    "jitter": 0.0,
    "padding": "none",
    "activation": "swiglu",
    "backend": "loop",
    "bias": False,
    "expert_bias": False,
    "pad": False,
    "gate_on": "output",
    "shared": None,
    "routing": "random",
    "seed": 0,
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=PLAIN | {"sequence": 1, "batch": 1, "capacity_factor": 1.0})  # one token
@example(case=PLAIN | {"routing": "collapsed", "backend": "grouped_mm"})  # all to one expert, the others empty
@example(case=PLAIN | {"routing": "collapsed", "capacity_factor": 0.1})  # all but one token lose everything
@example(case=PLAIN | {"routing": "tied", "top_k": 3, "capacity_factor": 1.0})
@example(case=PLAIN | {"sequence": 0, "capacity_factor": 1.0})  # no tokens
@example(case=PLAIN | {"gate_on": "input", "backend": "grouped_mm", "expert_bias": True})
@example(case=PLAIN | {"gate_on": "input", "load_balancing": "expert_choice", "capacity_factor": 1.0})
@example(case=PLAIN | {"gate_on": "input", "top_k": 3, "pad": True, "capacity_factor": 0.5, "padding": "some"})
@example(case=PLAIN | {"load_balancing": "expert_choice", "capacity_factor": 0.1, "padding": "some"})
@example(case=PLAIN | {"load_balancing": "sinkhorn", "padding": "some", "capacity_factor": 1.0, "jitter": 0.3})
@example(case=PLAIN | {"load_balancing": "seq_aux_loss", "padding": "some", "drop_policy": "random"})
@example(case=PLAIN | {"num_experts": 6, "top_k": 3, "scores": "sigmoid", "groups": 3, "routed_scaling_factor": 2.5})
def test_equals_the_reference_for_any_shape(case: dict[str, Any], runtime: Runtime) -> None:
    layer = sparse_layer_of(case, runtime)
    experts, batch = layer.moe.num_experts, case["batch"]
    x_SBD = random(case["sequence"], batch, case["hidden"], seed=case["seed"])
    if case["routing"] == "collapsed" and x_SBD.numel():
        x_SBD = force_experts(layer, x_SBD, [experts - 1] * (case["sequence"] * batch))
    elif case["routing"] == "tied":
        torch.nn.init.zeros_(layer.router.weight)
    padding = {"none": None, "some": random(batch, case["sequence"], seed=case["seed"]) > 0.3}
    padding["all"] = torch.ones(batch, case["sequence"], dtype=torch.bool)
    mask = padding[case["padding"]]
    real = case["sequence"] * batch if mask is None else int((~mask).sum())
    # A balanced plan of one token, or of tokens that are all alike, gives every expert the same: rounding chooses.
    assume(case["load_balancing"] != "sinkhorn" or (real != 1 and case["routing"] == "random"))
    compare(layer, x_SBD, case["activation"], mask)


def sparse_layer_of(case: dict[str, Any], runtime: Runtime) -> MoELayer:
    """The layer of a case, without the settings that do not go together (CONDITIONS in conf/limits.py)."""
    balancing = case["load_balancing"]
    by_loss, chooses = balancing not in ("sinkhorn", "expert_choice"), balancing == "expert_choice"
    groups = case["groups"] if by_loss else 1
    scores = "before" if chooses and case["scores"] == "after" else case["scores"]
    group_size = max(2, case["num_experts"] // groups)
    experts = group_size * groups
    top_k_groups = max(1, groups - 1)
    moe = MoeConfig(
        num_experts=experts,
        top_k=min(case["top_k"], group_size * top_k_groups),
        score_function="sigmoid" if scores == "sigmoid" else "softmax",
        softmax_order="after" if scores == "after" else "before",
        renormalize=None if chooses else case["renormalize"],
        routed_scaling_factor=case["routed_scaling_factor"],
        num_expert_groups=groups,
        top_k_groups=top_k_groups,
        capacity_factor=case["capacity_factor"] or (1.0 if chooses else None),
        drop_policy=case["drop_policy"],
        bias_update_rate=0.1 if case["bias"] and by_loss and scores != "after" else None,
        expert_bias=case["expert_bias"],
        pad_to_capacity=case["pad"] and (chooses or case["capacity_factor"] is not None),
        gate_on=case["gate_on"],
        num_shared_experts=2 if case["shared"] else 0,
        shared_expert_gate=case["shared"] == "gated",
        load_balancing=balancing,
        jitter=case["jitter"],
        aux_loss_coeff=0.5,
        z_loss_coeff=0.2,
    )
    # Weights of ordinary size: the gradient of a saturated sigmoid, s * (1 - s), has few digits left in fp32.
    sizes = {"hidden_size": case["hidden"], "ffn_hidden_size": case["ffn"], "init_scale": 1.0}
    model = tiny(moe, activation=case["activation"], **sizes)
    layer = sparse_layer(model, runtime, backend=case["backend"], seed=case["seed"])
    if layer.router.bias is not None:
        layer.router.bias.copy_(random(experts, seed=case["seed"]))
    randomise_biases(layer)
    if layer.router.last_load is not None:
        layer.router.last_load.copy_(random(experts, seed=case["seed"]).abs())
        layer.router.last_load.div_(layer.router.last_load.mean())
    return layer


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_top1_router_has_a_gradient(backend: str, runtime: Runtime) -> None:
    """From the task alone: a gate that is divided by itself is the constant 1, and only the balancing loss would be
    left to train the router."""
    moe = MoeConfig(num_experts=4, top_k=1, capacity_factor=None, aux_loss_coeff=0.0, z_loss_coeff=0.0)
    layer = sparse_layer(tiny(moe), runtime, backend=backend)
    compare(layer, random(4, 2, 8), "geglu")
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_empty_expert_does_not_crash_and_gets_zero_gradient(backend: str, runtime: Runtime) -> None:
    layer = sparse_layer(tiny(MoeConfig(num_experts=4, capacity_factor=None)), runtime, backend=backend)
    x_SBD = force_experts(layer, random(6, 1, 8), [2, 0, 2, 0, 0, 2])
    run_layer(layer, x_SBD.to(runtime.device)).square().sum().backward()
    for weight in (layer.experts.w_in, layer.experts.w_out):
        assert weight.grad is not None
        used = [bool(grad.abs().max() > 0) for grad in weight.grad]
        assert used == [True, False, True, False]
        assert weight.grad.isfinite().all()


def test_dropped_token_comes_out_as_zero(runtime: Runtime) -> None:
    """Capacity ceil(1.0 * 8 / 4) = 2: expert 1 takes tokens 0 and 2, expert 3 takes 1 and 5."""
    layer = sparse_layer(tiny(MoeConfig(num_experts=4, capacity_factor=1.0)), runtime)
    x_SBD = force_experts(layer, random(8, 1, 8), [1, 3, 1, 1, 1, 3, 3, 0])
    out_TD = run_layer(layer, x_SBD.to(runtime.device)).flatten(0, 1)
    assert [bool((row == 0).all()) for row in out_TD] == [False, False, False, True, True, False, True, False]


def test_probability_keeps_the_surest_tokens(runtime: Runtime) -> None:
    """Capacity ceil(1.0 * 8 / 4) = 2: expert 1 is wanted by tokens 0, 2, 3 and 4. Token 3 wants it most, then token 2;
    by position tokens 0 and 2 would have it."""
    moe = MoeConfig(num_experts=4, capacity_factor=1.0, drop_policy="probability")
    layer = sparse_layer(tiny(moe), runtime)
    x_SBD = force_experts(layer, random(8, 1, 8), [1, 3, 1, 1, 1, 3, 0, 0])
    x_SBD[:, 0, :4] *= torch.tensor([1.0, 1, 2, 3, 1, 1, 1, 1])[:, None]
    out_TD = run_layer(layer, x_SBD.to(runtime.device)).flatten(0, 1)
    assert [bool(row.any()) for row in out_TD] == [False, True, True, True, False, True, True, True]


def test_sequences_that_are_collapsed_apart_are_balanced_together(runtime: Runtime) -> None:
    """Two sequences, each with an expert of its own, of two experts: the micro-batch costs 1, each sequence 2."""
    for balancing, cost in [("aux_loss", 1), ("seq_aux_loss", 2)]:
        layer = sparse_layer(tiny(MoeConfig(num_experts=2, load_balancing=balancing)), runtime)
        x_SBD = force_experts(layer, random(4, 2, 8), [0, 1] * 4)
        layer.router.weight.data *= 100  # e^-300 is zero: the chosen expert's probability is exactly 1
        run_layer(layer, x_SBD.to(runtime.device))
        assert layer.statistics.sum_of("aux_loss") == cost


@pytest.mark.parametrize(("mode", "kept"), [(TRAIN, 3), (EVALUATE, 5), (GENERATE, 9)])
def test_capacity_follows_the_mode(mode: str, kept: int, runtime: Runtime) -> None:
    """Nine tokens want the same one of four experts: ceil(1.1 * 9 / 4) = 3, ceil(2.0 * 9 / 4) = 5, and no limit."""
    moe = MoeConfig(num_experts=4, capacity_factor=1.1, eval_capacity_factor=2.0)
    layer = sparse_layer(tiny(moe), runtime)
    x_SBD = force_experts(layer, random(3, 3, 8), [2] * 9)
    out_TD = run_layer(layer, x_SBD.to(runtime.device), BatchContext(mode)).flatten(0, 1)
    assert [bool(row.any()) for row in out_TD] == [True] * kept + [False] * (9 - kept)


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_uniform_routing_costs_exactly_one_and_full_collapse_exactly_the_experts(
    num_experts: int, runtime: Runtime
) -> None:
    layer = sparse_layer(tiny(MoeConfig(num_experts=num_experts, top_k=1)), runtime)
    x_SBD = force_experts(layer, random(8, 1, 8), [*range(num_experts)] * (8 // num_experts))
    layer.router.weight.data *= 100  # e^-300 is zero: the chosen expert's probability is exactly 1
    run_layer(layer, x_SBD.to(runtime.device))
    assert layer.statistics.sum_of("aux_loss") == 1.0
    layer.statistics.reset()
    run_layer(layer, x_SBD[:1].expand(8, 1, 8).to(runtime.device))
    assert layer.statistics.sum_of("aux_loss") == num_experts


def test_router_stays_fp32_under_a_bf16_model(runtime: Runtime) -> None:
    """bf16 has 8 bits of mantissa: had it touched the logits, they would be off by about 1e-2."""
    moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=1.0)
    layer = sparse_layer(tiny(moe, hidden_size=16, ffn_hidden_size=16), runtime, dtype=torch.bfloat16)
    x_SBD = random(6, 2, 16).bfloat16()
    assert layer.router.weight.dtype == torch.float32 and layer.experts.w_in.dtype == torch.bfloat16
    wanted = reference.sparse_layer(x_SBD.flatten(0, 1).double(), in_float64(layer), moe, "geglu", 1.0)
    with torch.autocast(runtime.device.type, dtype=torch.bfloat16):
        routing = layer.router(x_SBD.flatten(0, 1).to(runtime.device), sequences=12)
        out_SBD = run_layer(layer, x_SBD.to(runtime.device))
    probs_TE = routing.router_stats.probs_BE  # each token is a sequence by itself
    assert probs_TE.dtype == routing.gates_TK.dtype == torch.float32
    assert_close(probs_TE, wanted.probs_TE)
    assert routing.experts_TK.tolist() == wanted.experts
    assert out_SBD.dtype == torch.bfloat16
    assert_close(out_SBD, wanted.out_TD.view(x_SBD.shape), tolerance=2e-2)


def test_statistics_count_only_training_passes(runtime: Runtime) -> None:
    layer = sparse_layer(tiny(MoeConfig(num_experts=4)), runtime)
    x_SBD = random(4, 2, 8).to(runtime.device)
    for mode in (EVALUATE, GENERATE):
        run_layer(layer, x_SBD, BatchContext(mode))
    assert not layer.statistics.load_E.any() and not layer.statistics.sums.any()
    run_layer(layer, x_SBD, BatchContext(TRAIN))
    assert layer.statistics.load_E.sum() == layer.statistics.sum_of("tokens") == 8


def test_auxiliary_losses_leave_the_output_alone(runtime: Runtime) -> None:
    """They reach the router by gradient only; and without gradients the layer says the same."""
    x_SBD = random(4, 2, 8).to(runtime.device)
    with_losses, without = (
        sparse_layer(tiny(MoeConfig(num_experts=4, aux_loss_coeff=c, z_loss_coeff=c)), runtime) for c in (1.0, 0.0)
    )
    assert torch.equal(run_layer(with_losses, x_SBD), run_layer(without, x_SBD))
    with torch.no_grad():
        silent = run_layer(with_losses, x_SBD)
    assert torch.equal(silent, run_layer(without, x_SBD)) and not silent.requires_grad


@pytest.mark.parametrize("drop_policy", ["position", "probability", "random"])
@pytest.mark.parametrize("load_balancing", ["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn"])
def test_padded_to_capacity_the_host_never_waits_for_the_device(
    load_balancing: str, drop_policy: str, runtime: Runtime
) -> None:
    """A pass of the whole layer with tensors that have shapes but no values: whatever the host asks for, raises."""
    moe = {"num_experts": 4, "top_k": 2, "load_balancing": load_balancing, "drop_policy": drop_policy, "jitter": 0.01}
    for padded in (True, False):
        layer = sparse_layer(tiny(MoeConfig(**moe, pad_to_capacity=padded)), runtime)
        with FakeTensorMode(allow_non_fake_inputs=True):
            x_SBD = torch.empty(6, 2, 8, device=runtime.device, requires_grad=True)
            if not padded:
                with pytest.raises(DataDependentOutputException):
                    run_layer(layer, x_SBD)
                continue
            (gradient,) = torch.autograd.grad(run_layer(layer, x_SBD).sum(), x_SBD)
            assert gradient.shape == x_SBD.shape
