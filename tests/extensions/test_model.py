"""Score functions, activations and router metrics, by the recipes of CONTRIBUTING.md."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf import rules
from conf.registry import Registry
from conf.schema import (
    Config,
    ModelConfig,
    MoeConfig,
)
from moe.metrics import collect
from moe.router import ROUTE
from moe.router_metrics import ROUTER_METRICS, RouterMetric
from moe.score_functions import SCORE_FUNCTIONS, ScoreFunction, Scores
from ops.activations import ACTIVATIONS, Activation
from ops.experts import ExpertBackend
from ops.gemm_backend import Reference
from parallel.batch_context import TRAIN, BatchContext
from parallel.process_groups import Runtime
from tests.extensions.recipes import follow
from tests.moe import reference
from tests.moe.helpers import (
    assert_close,
    assert_gradients_close,
    in_float64,
    random,
    run_context,
    run_layer,
    selected,
    sparse_layer,
    tiny,
)
from training.flops import model_cost
from training.metrics import RunLog, step_keys


def check(**model: Any) -> None:
    rules.check(Config(model=ModelConfig(**model)), world_size=1)


def test_a_name_is_added_once(registries: list[Registry]) -> None:
    for registry in registries:
        name, entry = next(iter(registry.items()))
        with pytest.raises(ValueError, match=f"there is a {registry.kind} {name} already"):
            registry.add(entry)


def test_a_score_function(runtime: Runtime) -> None:
    moe = MoeConfig(num_experts=4, top_k=2, score_function="sqrtsoftplus", routed_scaling_factor=2.0)
    with pytest.raises(
        ValueError, match=r"softmax, sigmoid, but sqrtsoftplus is not available, and extensions=\[\] does"
    ):
        check(moe=moe)
    follow("A router score function")
    check(moe=moe)
    with pytest.raises(ValueError, match="score_function is one of softmax, sigmoid, sqrtsoftplus, but tanh"):
        check(moe=replace(moe, score_function="tanh"))

    layer = sparse_layer(tiny(moe), runtime)
    logits_TE = random(6, 4).to(runtime.device).requires_grad_()
    routing = layer.router.route(logits_TE, None, TRAIN, 1)
    scores_TE = (1 + logits_TE.double().exp()).log().sqrt()
    chosen_TK = scores_TE.topk(2).values
    assert_close(routing.gates_TK, 2 * chosen_TK / chosen_TK.sum(1, keepdim=True))
    assert_close(routing.router_stats.probs_BE[0], (scores_TE / scores_TE.sum(1, keepdim=True)).sum(0))
    (gradient,) = torch.autograd.grad(routing.gates_TK[:, 0].sum(), logits_TE)
    assert_close(gradient, torch.autograd.grad(2 * (chosen_TK[:, 0] / chosen_TK.sum(1)).sum(), logits_TE)[0])

    kernel, row = selected(ROUTE, run_context(tiny(moe), runtime, device=torch.device("cuda")))
    assert kernel is None and "Triton has no sqrtsoftplus scores" in row.why


def test_a_score_function_that_no_router_can_use() -> None:
    with pytest.raises(ValueError, match="falling: a larger logit does not give a larger score"):
        SCORE_FUNCTIONS.add(ScoreFunction("falling", lambda logits_TE: Scores(-logits_TE, logits_TE.softmax(-1))))
    with pytest.raises(ValueError, match="raw: the probabilities of a token do not add up to 1"):
        SCORE_FUNCTIONS.add(ScoreFunction("raw", lambda logits_TE: Scores(logits_TE.exp(), logits_TE.exp())))
    of_tokens = ScoreFunction("of_tokens", lambda logits_TE: Scores(logits_TE.sum(-1), logits_TE.softmax(-1)))
    softmax: Any = torch.softmax
    bare = ScoreFunction("bare", lambda logits_TE: softmax(logits_TE, -1))
    for entry in (of_tokens, bare):
        with pytest.raises(ValueError, match=rf"{entry.name}: it does not return Scores whose tensors are \[T, E\]"):
            SCORE_FUNCTIONS.add(entry)


@pytest.mark.parametrize("name", ["mish", "mishglu"])
@pytest.mark.parametrize("backend", ["loop", "fused", "grouped_mm", "reference"])
def test_an_activation(name: str, backend: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sparse layer with a shared expert, which is a dense layer, and with an empty expert."""
    moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=None, num_shared_experts=1)
    with pytest.raises(
        ValueError, match=f"activation is one of swiglu, geglu, gelu, relu, relu2, clamped_swiglu, but {name}"
    ):
        check(activation=name)
    follow("An activation")
    check(activation=name)

    model = tiny(moe, activation=name, hidden_size=16, ffn_hidden_size=24)
    layer = sparse_layer(model, runtime, backend=ExpertBackend.on(Reference()) if backend == "reference" else backend)
    x_SBD = random(9, 2, 16).to(runtime.device).requires_grad_()
    out_SBD = run_layer(layer, x_SBD)
    above_SBD = random(9, 2, 16, seed=1).to(runtime.device)
    out_SBD.backward(above_SBD)

    weights = in_float64(layer)
    exact_SBD = x_SBD.detach().cpu().double().requires_grad_()
    monkeypatch.setattr(reference, "gelu", lambda h: h * torch.tanh(torch.log(1 + torch.exp(h))))
    like = {"mish": "gelu", "mishglu": "geglu"}[name]
    wanted = reference.sparse_layer(exact_SBD.flatten(0, 1), weights, moe, like, None)
    assert_close(out_SBD, wanted.out_TD.view(9, 2, 16))
    losses = moe.aux_loss_coeff * wanted.aux_loss + moe.z_loss_coeff * wanted.z_loss
    ((wanted.out_TD.view(9, 2, 16) * above_SBD.cpu()).sum() + losses).backward()
    assert_close(x_SBD.grad, exact_SBD.grad)
    assert_gradients_close(layer, weights)

    ungated = model_cost(replace(model, activation="relu"), 16)
    extra = 5 * 16 * 24 * model.num_layers if name == "mishglu" else 0  # of four experts and the shared one
    assert model_cost(model, 16).total == ungated.total + extra


def test_a_gradient_of_another_function() -> None:
    with pytest.raises(ValueError, match="activation odd: its gradient is not that of the function"):
        ACTIVATIONS.add(Activation("odd", False, torch.tanh, lambda grad, h: grad))


def test_a_router_metric(runtime: Runtime, tmp_path: Path) -> None:
    """Two layers, two micro-batches, of which the second has padding that would be the largest."""
    before = step_keys()
    follow("A router metric")
    moe = MoeConfig(num_experts=4, top_k=2, renormalize=False)
    layers = {index: sparse_layer(tiny(moe), runtime, seed=index) for index in (1, 3)}
    batches = [random(5, 2, 8, seed=seed).to(runtime.device) for seed in (10, 11)]
    batches[1][4] *= 100
    padding_BS = torch.zeros(2, 5, dtype=torch.bool, device=runtime.device)
    padding_BS[:, 4] = True
    gates, logits = [], []
    for layer in layers.values():
        real_TD = torch.cat([batches[0].flatten(0, 1), batches[1][:4].flatten(0, 1)])
        logits_TE = real_TD @ layer.router.weight.T
        gates.append(logits_TE.softmax(1).amax(1).mean().item())
        logits.append(logits_TE.max().item())
        run_layer(layer, batches[0])
        run_layer(layer, batches[1], BatchContext(padding_BS=padding_BS))
    statistics = {index: layer.statistics for index, layer in layers.items()}
    load = collect(statistics, [1, 3], 4, runtime.layout, 2, runtime.device)
    assert load is not None
    row = load.as_row()
    assert row["router_first_gate"] == pytest.approx(np.mean(gates), rel=1e-5)
    assert row["router_max_logit"] == pytest.approx(max(logits), rel=1e-5)

    added = ["router_first_gate", "router_max_logit"]
    assert [key for key in step_keys() if key not in before] == added
    log = RunLog(tmp_path, warn=pytest.fail)
    log.step(dict.fromkeys(step_keys(), 0.5) | {"step": 1} | row, load)
    log.close()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {key: line[key] for key in added} == {key: row[key] for key in added}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/router_max_logit")[0].value == pytest.approx(max(logits), rel=1e-5)
    assert board.Scalars("moe/layer_03/router_first_gate")[0].value == pytest.approx(gates[1], rel=1e-5)

    again = collect(statistics, [1, 3], 4, runtime.layout, 2, runtime.device)
    assert again is not None and (again.metric("router_max_logit") == -np.inf).all()  # a new interval


def test_a_router_metric_says_what_it_is_computed_from(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="odd: give one of compute and of_load"):
        RouterMetric("odd", "mean")
    ROUTER_METRICS.add(RouterMetric("odd", "mean", lambda layer: layer.routing.logits_TE))
    layer = sparse_layer(tiny(MoeConfig(num_experts=4)), runtime)
    with pytest.raises(ValueError, match=r"router metric odd is \[6, 4\]; give a value of each token, or a scalar"):
        layer(random(3, 2, 8).to(runtime.device))
