"""What must have no say in routing (padding, the rank's own generator), and what must: jitter, chance, past loads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import DROP_POLICIES, LOAD_BALANCING, MoeConfig
from moe.layer import MoELayer
from parallel.batch_context import EVALUATE, GENERATE, TRAIN, BatchContext
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, force_experts, random, run_layer, sparse_layer, tiny, whole_model

SWITCH = MoeConfig(num_experts=4, capacity_factor=1.0, aux_loss_coeff=0.5, z_loss_coeff=0.2)


def passed(layer: MoELayer, x_SBD: Tensor, above_SBD: Tensor, **batch_ctx: Any) -> dict[str, Tensor]:
    """Everything that a forward and backward pass leaves."""
    x_SBD = x_SBD.clone().requires_grad_()
    layer.zero_grad()
    layer.statistics.reset()
    out_SBD = run_layer(layer, x_SBD, BatchContext(**batch_ctx))
    out_SBD.backward(above_SBD)
    return {
        "out": out_SBD.detach(),
        "x.grad": x_SBD.grad,
        "load": layer.statistics.load_E.clone(),
        "sums": layer.statistics.sums.clone(),
        **{name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("drop_policy", DROP_POLICIES[:2])
@pytest.mark.parametrize("load_balancing", LOAD_BALANCING)
def test_padding_is_no_load(load_balancing: str, drop_policy: str, runtime: Runtime) -> None:
    """Four positions without a token come first, each with large values that all name expert 1: were they counted,
    they would fill it, and the losses and the log would be theirs. The rest is as if they were not there."""
    moe = replace(SWITCH, load_balancing=load_balancing, drop_policy=drop_policy)
    layer = sparse_layer(tiny(moe), runtime)
    tokens_SBD = force_experts(layer, random(8, 1, 8), [1, 3, 1, 0, 1, 2, 1, 0]).to(runtime.device)
    padding_SBD = 30 * force_experts(layer, random(4, 1, 8, seed=1), [1] * 4).to(runtime.device)
    above_SBD = random(12, 1, 8, seed=2).to(runtime.device)
    padding_BS = torch.arange(12, device=runtime.device)[None] < 4
    wanted = passed(layer, tokens_SBD, above_SBD[4:])
    got = passed(layer, torch.cat([padding_SBD, tokens_SBD]), above_SBD, padding_BS=padding_BS)
    for name in ("out", "x.grad"):
        assert not got[name][:4].any()
        got[name] = got[name][4:]
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(got[name], value.double())
    if load_balancing == "aux_loss":  # and without the mask it would not be so
        unmasked = passed(layer, torch.cat([padding_SBD, tokens_SBD]), above_SBD)
        assert unmasked["load"][1] == wanted["load"][1] + 4 and not unmasked["out"][4:7:2].any()


@pytest.mark.parametrize("mode", [EVALUATE, GENERATE])
def test_padding_takes_no_place_outside_of_training(mode: str, runtime: Runtime) -> None:
    """ceil(4.0 * 2 / 4) = 2 places in evaluation, which the two tokens get."""
    layer = sparse_layer(tiny(replace(SWITCH, eval_capacity_factor=4.0)), runtime)
    x_SBD = force_experts(layer, random(6, 1, 8), [1] * 6).to(runtime.device)
    padding_BS = torch.tensor([[True, True, False, True, False, True]], device=runtime.device)
    out_SBD = run_layer(layer, x_SBD, BatchContext(mode, padding_BS=padding_BS))
    assert [bool(row.any()) for row in out_SBD[:, 0]] == [False, False, True, False, True, False]


def test_jitter_is_for_training_and_named_by_the_pass(runtime: Runtime) -> None:
    layer, plain = (
        sparse_layer(tiny(replace(SWITCH, jitter=jitter, capacity_factor=None)), runtime) for jitter in (0.3, 0.0)
    )
    x_SBD, above_SBD = (random(6, 2, 8, seed=seed).to(runtime.device) for seed in (3, 4))
    first = passed(layer, x_SBD, above_SBD, step=3, micro_batch=1)
    torch.manual_seed(5)  # the generator of the rank has no say
    again = passed(layer, x_SBD, above_SBD, step=3, micro_batch=1)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    for other in ({"step": 4, "micro_batch": 1}, {"step": 3, "micro_batch": 0}):
        assert not torch.equal(passed(layer, x_SBD, above_SBD, **other)["out"], first["out"])
    for mode in (EVALUATE, GENERATE):
        assert torch.equal(run_layer(layer, x_SBD, BatchContext(mode)), run_layer(plain, x_SBD, BatchContext(mode)))


def test_jitter_keeps_its_bounds(runtime: Runtime) -> None:
    """And uses them: 16,000 factors come within a thousandth of both."""
    layer = sparse_layer(tiny(replace(SWITCH, jitter=0.25)), runtime)
    factors = layer._jittered(torch.ones(2000, 8, device=runtime.device), BatchContext(TRAIN))
    assert 0.75 <= factors.min() < 0.751 and 1.249 < factors.max() <= 1.25


def test_random_drops_fall_on_all_places_alike(runtime: Runtime) -> None:
    """Eight tokens want one expert that has two places: over 400 steps each gets one in about a quarter (five standard
    deviations are 44). By position it would always be the first two."""
    layer = sparse_layer(tiny(replace(SWITCH, drop_policy="random")), runtime)
    x_SBD = force_experts(layer, random(8, 1, 8), [1] * 8).to(runtime.device)
    served_T = torch.zeros(8)
    with torch.no_grad():
        for step in range(400):
            kept_T = run_layer(layer, x_SBD, BatchContext(step=step)).any(-1).flatten().cpu()
            assert kept_T.sum() == 2
            served_T += kept_T
    assert (served_T - 100).abs().max() < 44


def test_other_layers_draw_other_numbers(runtime: Runtime) -> None:
    layer = sparse_layer(tiny(replace(SWITCH, drop_policy="random", jitter=0.3)), runtime)
    keys = [layer._key("drop", BatchContext()), layer._key("jitter", BatchContext())]
    layer.draws = (layer.draws[0], layer.draws[1] + 1)
    assert len({*keys, layer._key("drop", BatchContext()), layer._key("jitter", BatchContext())}) == 4


def test_global_balance_holds_probabilities_against_the_last_steps_loads(runtime: Runtime) -> None:
    """Drawn by hand. The first step costs 1 whatever it does. Its two micro-batches give expert 0 six choices and the
    others two, none and none; then what goes to expert 0 costs 6 / 2, what goes to expert 2 nothing."""
    moe = replace(SWITCH, load_balancing="global_aux_loss", capacity_factor=None)
    stage = whole_model(tiny(moe, num_layers=1), runtime)
    layer = stage.layers["0"].ffn

    def cost(experts: list[int]) -> float:
        layer.statistics.reset()
        x_SBD = force_experts(layer, random(4, 1, 8), experts).to(runtime.device)
        layer.router.weight.data *= 100  # e^-300 is zero: the chosen expert's probability is exactly 1
        run_layer(layer, x_SBD)
        return layer.statistics.sum_of("aux_loss")

    assert [cost([0, 0, 0, 1]), cost([0, 0, 0, 1])] == [1, 1]
    stage.end_step(applied=True)
    assert layer.router.last_load.tolist() == [3, 1, 0, 0]
    assert [cost([0, 0, 0, 0]), cost([2, 2, 2, 2]), cost([0, 1, 2, 3])] == [3, 0, 1]
    stage.end_step(applied=False)  # a skipped update: its loads are forgotten
    assert layer.router.last_load.tolist() == [3, 1, 0, 0]
    cost([0, 1, 2, 3])
    stage.end_step(applied=True)
    assert layer.router.last_load.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("counts", "wanted"), [("scores", [4, 0, 0, 0]), ("assignments", [0, 0, 4, 0])])
def test_global_balance_counts_what_it_is_told_to(counts: str, wanted: list[int], runtime: Runtime) -> None:
    """A bias sends every token whose best expert is 0 to expert 2: the loss pushes against the router's own liking, the
    bias goes by what is chosen."""
    moe = replace(SWITCH, load_balancing="global_aux_loss", bias_update_rate=0.5, aux_loss_counts=counts)
    stage = whole_model(tiny(moe, num_layers=1), runtime)
    layer = stage.layers["0"].ffn
    layer.router.bias.data[2] = 9.0
    run_layer(layer, force_experts(layer, random(4, 1, 8), [0, 0, 0, 0]).to(runtime.device))
    stage.end_step(applied=True)
    assert layer.router.last_load.tolist() == wanted
    assert layer.router.bias.tolist() == [0.5, 0.5, 8.5, 0.5]
