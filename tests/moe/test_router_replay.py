"""A sparse layer whose routing is forced, against a loop in float64 and Megatron-Core's RouterReplay; and what is no
routing of a model."""

import re
from dataclasses import replace

import pytest
import torch

from conf.schema import MoeConfig
from moe.router_replay import check_routing
from parallel.batch_context import BatchContext
from tests.moe import reference
from tests.moe.helpers import assert_close, assert_gradients_close, in_float64, random, sparse_layer, tiny

MOES = {
    "softmax": MoeConfig(num_experts=4, top_k=2, capacity_factor=None),
    "drops": MoeConfig(num_experts=4, top_k=2, capacity_factor=0.75),
    "by_gate": MoeConfig(num_experts=4, top_k=2, capacity_factor=0.75, drop_policy="probability"),
    "switch": MoeConfig(num_experts=4, top_k=1, capacity_factor=1.0),
    "after": MoeConfig(num_experts=4, top_k=2, softmax_order="after", capacity_factor=None),
    "sigmoid": MoeConfig(
        num_experts=8, top_k=3, score_function="sigmoid", bias_update_rate=0.01, routed_scaling_factor=2.5
    ),
    "groups": MoeConfig(num_experts=8, top_k=2, num_expert_groups=4, top_k_groups=2, score_function="sigmoid"),
}


def random_routing(moe: MoeConfig, sequence: int, batch: int, layers: int = 2) -> torch.Tensor:
    """[B, S, L, K]"""
    draws = torch.rand(batch, sequence, layers, moe.num_experts, generator=torch.Generator().manual_seed(3))
    return draws.argsort(-1)[..., : moe.top_k]


@pytest.mark.parametrize("recompute", [[], ["moe"]], ids=str)
@pytest.mark.parametrize("name", MOES)
def test_forced_experts_get_the_gates_and_gradients_of_a_float64_loop(name, recompute, runtime, monkeypatch):
    moe = MOES[name]
    model = tiny(moe, recompute=recompute)
    layer = sparse_layer(model, runtime)
    x_SBD = random(6, 2, 8, seed=1).requires_grad_()
    routing_BSLK = random_routing(moe, 6, 2)
    forced_TK = routing_BSLK[:, :, 0].transpose(0, 1).flatten(0, 1)
    preferred = layer.router(x_SBD.detach().flatten(0, 1)).experts_TK
    assert not torch.equal(preferred, forced_TK)

    out_SBD, report = layer(x_SBD, BatchContext(routing_BSLK=routing_BSLK))
    direction = random(*out_SBD.shape, seed=2)
    (out_SBD * direction).sum().backward()

    weights, x_TD = in_float64(layer), x_SBD.detach().double().flatten(0, 1).requires_grad_()
    monkeypatch.setattr(reference, "decide", lambda logits_TE, moe: forced_TK.tolist())
    wanted = reference.sparse_layer(x_TD, weights, moe, model.activation, moe.capacity_factor)
    assert_close(out_SBD.flatten(0, 1), wanted.out_TD)
    assert report.load_E.tolist() == torch.bincount(forced_TK.flatten(), minlength=moe.num_experts).tolist()
    loss = (wanted.out_TD * direction.double().flatten(0, 1)).sum()
    (loss + moe.aux_loss_coeff * wanted.aux_loss + moe.z_loss_coeff * wanted.z_loss).backward()
    assert_close(x_SBD.grad.flatten(0, 1), x_TD.grad)
    assert_gradients_close(layer, weights)
    assert layer.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded to the capacity"])
@pytest.mark.parametrize("factor", [None, 0.75], ids=["dropless", "drops"])
def test_recorded_drops_take_the_place_of_the_capacity(factor, padded, runtime, monkeypatch):
    """Against a float64 loop that drops the same assignments, some experts getting more than their capacity."""
    if padded and factor is None:
        pytest.skip("there is no capacity to pad to")
    moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=factor, pad_to_capacity=padded)
    model = tiny(moe)
    layer = sparse_layer(model, runtime)
    x_SBD, routing_BSLK = random(6, 2, 8, seed=1).requires_grad_(), random_routing(moe, 6, 2)
    routing_BSLK[:, :5, 0, 0], routing_BSLK[:, :5, 0, 1] = 3, 1  # ten tokens to two experts
    kept_BSLK = torch.rand(routing_BSLK.shape, generator=torch.Generator().manual_seed(4)) < 0.8
    forced_TK, kept_TK = (t[:, :, 0].transpose(0, 1).flatten(0, 1) for t in (routing_BSLK, kept_BSLK))
    assert 0 < kept_TK.sum() < kept_TK.numel() and kept_TK[forced_TK == 3].sum() > 5  # 0.75 * 12 * 2 / 4 = 4.5

    out_SBD, report = layer(x_SBD, BatchContext(routing_BSLK=routing_BSLK, routing_kept_BSLK=kept_BSLK))
    out_SBD.square().sum().backward()
    weights, x_TD = in_float64(layer), x_SBD.detach().double().flatten(0, 1).requires_grad_()
    monkeypatch.setattr(reference, "decide", lambda logits_TE, moe: forced_TK.tolist())
    monkeypatch.setattr(reference, "keep_first", lambda *_: kept_TK.tolist())
    wanted = reference.sparse_layer(x_TD, weights, moe, model.activation, factor)
    assert_close(out_SBD.flatten(0, 1), wanted.out_TD)
    loss = wanted.out_TD.square().sum() + moe.aux_loss_coeff * wanted.aux_loss + moe.z_loss_coeff * wanted.z_loss
    loss.backward()
    assert_close(x_SBD.grad.flatten(0, 1), x_TD.grad)
    assert report.load_E.sum() == kept_TK.numel()  # loads count what was dropped, too


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_gates_are_those_of_megatron_cores_router_replay(score_function, runtime):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    order = "after" if score_function == "softmax" else "before"
    moe = MoeConfig(num_experts=8, top_k=3, score_function=score_function, softmax_order=order)
    router = sparse_layer(tiny(moe), runtime).router
    logits_TE, forced_TK = 2 * random(12, 8), random_routing(moe, 12, 1)[0, :, 0]
    theirs = RouterReplay()
    try:
        theirs.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        theirs.set_target_indices(forced_TK)
        probs_TE, chosen_TE = topk_routing_with_score_function(
            logits_TE, 3, score_function=score_function, router_replay=theirs
        )
    finally:
        RouterReplay.clear_global_router_replay_instances()
    ours = router.route(logits_TE, None, "train", 1, forced_TK)
    assert torch.equal(chosen_TE, torch.zeros_like(chosen_TE).scatter(1, ours.experts_TK, True))
    torch.testing.assert_close(ours.gates_TK, probs_TE.gather(1, forced_TK), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MOES)
def test_the_own_routing_changes_no_bit(name, runtime):
    layer = sparse_layer(tiny(MOES[name]), runtime)
    if layer.router.bias is not None:
        layer.router.bias.data.copy_(random(MOES[name].num_experts, seed=9))
    x_SBD, padding_BS = random(6, 2, 8, seed=1), torch.arange(6).expand(2, -1) >= 5
    recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recorder:
        def record(self, micro_batch, number, experts_SBK, gates_SBK, kept_SBK) -> None:
            recorded.append((experts_SBK, kept_SBK))

    passed = BatchContext(padding_BS=padding_BS, recorder=Recorder())
    free, report = layer(x_SBD, passed)
    layer.record(report, passed)
    routing_BSLK, kept_BSLK = (t.transpose(0, 1).unsqueeze(2) for t in recorded[0])
    assert (routing_BSLK[:, 5] == MOES[name].num_experts).all() and len(recorded) == 1
    assert not kept_BSLK[:, 5].any() and not (name == "drops" and kept_BSLK[:, :5].all())
    for kept in (None, kept_BSLK):
        passed = BatchContext(padding_BS=padding_BS, routing_BSLK=routing_BSLK, routing_kept_BSLK=kept)
        assert torch.equal(free, layer(x_SBD, passed)[0])


def test_what_is_no_routing_of_the_model_is_named():
    model = tiny(MoeConfig(num_experts=4, top_k=2, every=2), num_layers=4)
    good = random_routing(model.moe, 5, 3)
    check_routing(good, good > 0, model, (3, 5))

    def refused(routing: torch.Tensor | None, message: str, changed=model, kept: torch.Tensor | None = None) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            check_routing(routing, kept, changed, (3, 5))

    refused(good[:2], "2 sequences, but the model's batch has 3")
    refused(good[:, :4], "4 tokens, but the model's batch has 5")
    refused(good[:, :, :1], "1 sparse layers, but the model's batch has 2")
    refused(good[..., :1], "1 top_k, but the model's batch has 2")
    refused(good[0], "it must be integers [sequences, tokens, sparse layers, top_k]")
    refused(good.float(), "it must be integers")
    wrong, twice = good.clone(), good.clone()
    wrong[1, 2, 1, 0], twice[2, 0, 0] = 4, 1
    refused(wrong, "token 2 of sequence 1 in layer 3 to expert 4, but model.moe.num_experts=4")
    refused(twice, "token 0 of sequence 2 in layer 1 to one expert twice: [1, 1]")
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 2] = True
    check_routing(wrong, None, model, (3, 5), padding)
    refused(None, "and there is no routing", kept=good > 0)
    refused(good, "it must be torch.bool of routing's shape", kept=good)
    refused(good, "routing_kept is [2, 5, 2, 2]", kept=good[:2] > 0)
    refused(good, "needs sparse layers", tiny(num_layers=4))
    chosen = replace(model.moe, load_balancing="expert_choice")
    refused(good, "experts choose tokens", replace(model, moe=chosen))
