"""The router: its order, its gates and their gradient."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from conf.schema import ModelConfig, MoeConfig
from models.init import initialise
from moe.router import Router
from parallel.batch_context import EVALUATE, GENERATE, TRAIN
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import assert_close, in_float64, random, tiny


def router_of(model: ModelConfig, runtime: Runtime) -> Router:
    router = Router(model, sequence_parallel=False, groups=runtime.groups).to(runtime.device)
    initialise(router, seed=1)
    return router


@pytest.mark.parametrize(
    "choice",
    [
        {"top_k": 1, "renormalize": False},
        {"top_k": 2, "renormalize": False},
        {"top_k": 2, "renormalize": True},
        {"top_k": 3, "renormalize": True},
        {"top_k": 2, "softmax_order": "after"},
        {"top_k": 1, "score_function": "sigmoid"},
        {"top_k": 2, "score_function": "sigmoid", "num_expert_groups": 2, "routed_scaling_factor": 2.5},
        {"top_k": 1, "load_balancing": "sinkhorn"},
        {"top_k": 2, "load_balancing": "sinkhorn", "renormalize": False},
        {"top_k": 2, "load_balancing": "expert_choice"},
    ],
    ids=str,
)
def test_gates_pass_gradcheck(choice: dict[str, Any], runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where finite differences are exact enough: the router's own cast to fp32 is made a cast to that."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = tiny(MoeConfig(num_experts=4, **choice))
    router = router_of(model, runtime)
    weight_ED = router.weight.detach().double().requires_grad_()
    x_TD = random(3, 8).double().to(runtime.device).requires_grad_()

    def gates(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return functional_call(router, {"weight": weight_ED}, (x_TD,)).gates_TK

    assert torch.autograd.gradcheck(gates, (x_TD, weight_ED))
    (gradient,) = torch.autograd.grad(gates(x_TD, weight_ED)[:, 0].sum(), weight_ED)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("top_k", "renormalize", "sums_to_one"),
    [(1, None, False), (1, False, False), (2, None, True), (2, True, True), (2, False, False), (3, None, True)],
)
def test_gates_are_probabilities_renormalised_when_several(
    top_k: int, renormalize: bool | None, sums_to_one: bool, runtime: Runtime
) -> None:
    router = router_of(tiny(MoeConfig(num_experts=5, top_k=top_k, renormalize=renormalize)), runtime)
    x_TD = random(7, 8)
    routing = router(x_TD.to(runtime.device), sequences=len(x_TD))
    logits_TE = x_TD.double() @ in_float64(router)["weight"].detach().t()
    probs_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    experts = [reference.choose(probs_E, top_k) for probs_E in probs_TE]
    gates = [reference.gates_of(p, e, renormalize) for p, e in zip(probs_TE, experts, strict=True)]
    assert_close(routing.router_stats.probs_BE, probs_TE)  # each token is a sequence by itself
    assert_close(routing.router_stats.z, (logits_TE.exp().sum(1).log() ** 2).sum())
    assert routing.experts_TK.tolist() == experts
    assert_close(routing.gates_TK, torch.stack([torch.stack(row) for row in gates]))
    assert torch.allclose(routing.gates_TK.sum(1), torch.ones(7, device=runtime.device)) == sums_to_one


FIELD = {
    # Mixtral, arXiv:2401.04088, section 2.1
    "mixtral": {"top_k": 2, "softmax_order": "after"},
    # DeepSeek-V3, arXiv:2412.19437, eq. 12 to 15: of four groups of three experts the best two
    "deepseek_v3": {
        "top_k": 3,
        "score_function": "sigmoid",
        "num_expert_groups": 4,
        "top_k_groups": 2,
        "routed_scaling_factor": 2.5,
    },
    "sigmoid_switch": {"top_k": 1, "score_function": "sigmoid"},
    "sigmoid_as_it_is": {"top_k": 3, "score_function": "sigmoid", "renormalize": False},
    "groups": {"top_k": 2, "num_expert_groups": 3, "top_k_groups": 2},
    # DeepSeek-V2, arXiv:2405.04434, section 2.2.2
    "deepseek_v2": {
        "top_k": 3,
        "renormalize": False,
        "num_expert_groups": 4,
        "top_k_groups": 2,
        "group_score": "max",
        "routed_scaling_factor": 16.0,
    },
    "groups_by_logits": {"top_k": 3, "softmax_order": "after", "num_expert_groups": 4, "top_k_groups": 1},
}


@pytest.mark.parametrize("choice", FIELD.values(), ids=FIELD)
def test_other_routers_equal_the_reference(choice: dict[str, Any], runtime: Runtime) -> None:
    moe = MoeConfig(num_experts=12, **choice)
    router = router_of(tiny(moe), runtime)
    x_TD = random(40, 8)
    routing = router(x_TD.to(runtime.device), sequences=len(x_TD))
    logits_TE = x_TD.double() @ in_float64(router)["weight"].detach().t()
    probs, experts, gates = zip(*(reference.route(logits_E, moe) for logits_E in logits_TE), strict=True)
    assert routing.experts_TK.tolist() == list(experts)
    assert_close(routing.router_stats.probs_BE, torch.stack(probs))
    assert_close(routing.gates_TK, torch.stack([torch.stack(row) for row in gates]))


@pytest.mark.parametrize(
    ("setting", "value", "changed"),
    [
        ("score_function", "sigmoid", ("gates_TK", "probs_BE", "entropy")),
        ("softmax_order", "after", ("gates_TK",)),
        ("routed_scaling_factor", 2.5, ("gates_TK",)),
        ("num_expert_groups", 4, ("gates_TK", "experts_TK", "load_BE")),
        ("load_balancing", "sinkhorn", ("gates_TK", "experts_TK", "load_BE")),
        ("load_balancing", "expert_choice", ("gates_TK", "experts_TK", "load_BE")),
    ],
)
def test_each_setting_changes_the_routing(setting: str, value: Any, changed: tuple[str, ...], runtime: Runtime) -> None:
    """Beside plain softmax probabilities: what depends on the setting, and nothing else."""
    plain = MoeConfig(num_experts=12, top_k=2, renormalize=False)
    x_TD = random(40, 8).to(runtime.device)
    found = []
    for moe in (plain, dataclasses.replace(plain, **{setting: value})):
        routing = router_of(tiny(moe), runtime)(x_TD)
        found.append({"gates_TK": routing.gates_TK, "experts_TK": routing.experts_TK, **vars(routing.router_stats)})
    before, after = found
    assert tuple(name for name in before if not torch.equal(before[name], after[name])) == changed


def test_the_best_group_is_not_the_one_of_the_best_expert(runtime: Runtime) -> None:
    """Drawn by hand, three groups of two. Their two best scores add up to 0.5 + 0, 0.3 + 0.1 and 0.3 + 0.3: the last
    group wins although the first has the best expert; with two groups the first one joins it."""
    scores_TE = torch.tensor([[0.5, 0.0, 0.3, 0.1, 0.3, 0.3]], device=runtime.device)
    for top_k_groups, chosen in [(1, [4, 5]), (2, [0, 4])]:
        moe = MoeConfig(num_experts=6, top_k=2, num_expert_groups=3, top_k_groups=top_k_groups)
        router = router_of(tiny(moe), runtime)
        router.weight.data = torch.eye(6, 8, device=runtime.device)
        x_TD = torch.nn.functional.pad(scores_TE, (0, 2)).log().clamp(min=-50)
        x_TD[:, 6:] = 0
        assert router(x_TD).experts_TK.tolist() == [chosen]


def test_logits_tell_experts_apart_whose_probabilities_underflow(runtime: Runtime) -> None:
    """e^-200 and e^-300 are both 0 in fp32: by probability the second choice is the lower expert, by logit the
    likelier one."""
    for order, chosen in [("before", [0, 1]), ("after", [0, 2])]:
        router = router_of(tiny(MoeConfig(num_experts=3, top_k=2, softmax_order=order)), runtime)
        router.weight.data = torch.eye(3, 8, device=runtime.device)
        x_TD = torch.tensor([[0.0, -300, -200, 0, 0, 0, 0, 0]], device=runtime.device)
        assert router(x_TD).experts_TK.tolist() == [chosen]


def test_sigmoids_that_all_underflow_are_shared_out_all_the_same(runtime: Runtime) -> None:
    router = router_of(tiny(MoeConfig(num_experts=4, top_k=2, score_function="sigmoid")), runtime)
    router.weight.data = torch.full((4, 8), -100.0, device=runtime.device)
    routing = router(torch.ones(1, 8, device=runtime.device))
    assert routing.gates_TK.tolist() == [[0.5, 0.5]] and routing.router_stats.probs_BE.tolist() == [[0.25] * 4]


def test_a_bias_changes_the_choice_and_not_the_gates(runtime: Runtime) -> None:
    moe = MoeConfig(num_experts=4, score_function="sigmoid", bias_update_rate=0.25)
    router = router_of(tiny(moe), runtime)
    router.weight.data = torch.eye(4, 8, device=runtime.device)
    x_TD = torch.tensor([[0.5, 0.2, 0, 0, 0, 0, 0, 0]], device=runtime.device)
    assert router.bias is not None and router(x_TD).experts_TK.tolist() == [[0]]
    # Mean 3: expert 0 is above it, 1 is at it, 2 and 3 are below.
    router.end_step(torch.tensor([7, 3, 2, 0], dtype=torch.float64, device=runtime.device))
    assert router.bias.tolist() == [-0.25, 0, 0.25, 0.25] and router.bias.dtype == torch.float32
    routing = router(x_TD)
    assert routing.experts_TK.tolist() == [[2]] and routing.gates_TK.tolist() == [[0.5]]


def test_only_training_follows_the_plan(runtime: Runtime) -> None:
    """A router that likes expert 0 best for every token, some more than others."""
    router = router_of(tiny(MoeConfig(num_experts=2, load_balancing="sinkhorn")), runtime)
    router.weight.data = torch.eye(2, 8, device=runtime.device)
    x_TD = torch.zeros(4, 8, device=runtime.device)
    x_TD[:, 0] = torch.tensor([4.0, 1.0, 3.0, 2.0])
    chosen = {mode: router(x_TD, mode=mode).experts_TK.flatten().tolist() for mode in (TRAIN, EVALUATE, GENERATE)}
    assert chosen == {TRAIN: [0, 1, 0, 1], EVALUATE: [0] * 4, GENERATE: [0] * 4}
    # The gate is the chosen expert's own score, not the plan's.
    assert_close(router(x_TD).gates_TK[1], 1 / (1 + torch.tensor([1.0]).double().exp()))


def test_an_expert_that_chooses_weighs_a_token_by_its_score(runtime: Runtime) -> None:
    """ceil(1.0 * 4 * 1 / 2) = 2 tokens each; gates are softmax scores whatever else took the token."""
    moe = MoeConfig(num_experts=2, load_balancing="expert_choice", capacity_factor=1.0)
    router = router_of(tiny(moe), runtime)
    router.weight.data = torch.eye(2, 8, device=runtime.device)
    x_TD = torch.zeros(4, 8, device=runtime.device)
    x_TD[:, 0] = torch.tensor([3.0, -1.0, 2.0, 0.0])
    for mode in (TRAIN, EVALUATE):
        routing = router(x_TD, mode=mode)
        assert routing.experts_TK.tolist() == [[0], [1], [0], [1]]
        wanted = torch.tensor([3.0, 1.0, 2.0, 0.0]).double().sigmoid()
        assert_close(routing.gates_TK[:, 0], wanted)


def test_ties_break_to_the_lower_expert_every_time(runtime: Runtime) -> None:
    """Of 64 experts, every group of eight shares a row. An unstable sort keeps order up to 16 elements and then not."""
    router = router_of(tiny(MoeConfig(num_experts=64, top_k=12)), runtime)
    with torch.no_grad():
        router.weight.copy_(router.weight[::8].repeat(8, 1))
    x_TD = random(200, 8).to(runtime.device)
    experts_TK = router(x_TD).experts_TK
    for first, chosen in zip((x_TD @ router.weight[:8].t()).argsort(1, descending=True), experts_TK, strict=True):
        best, second = first[:2].tolist()
        assert chosen.tolist() == [*range(best, 64, 8), *range(second, 64, 8)][:12]
    assert torch.equal(router(x_TD).experts_TK, experts_TK)


def test_uniform_router_takes_the_first_experts(runtime: Runtime) -> None:
    router = router_of(tiny(MoeConfig(num_experts=64, top_k=3)), runtime)
    torch.nn.init.zeros_(router.weight)
    assert router(random(50, 8).to(runtime.device)).experts_TK.tolist() == [[0, 1, 2]] * 50


def test_tiny_sigmoids_are_balanced_like_any_others(runtime: Runtime) -> None:
    """Their sum is far below 1e-20; shares and gates must still add up to 1."""
    moe = MoeConfig(num_experts=6, top_k=2, score_function="sigmoid", bias_update_rate=0.0)
    router = Router(ModelConfig(hidden_size=8, moe=moe), sequence_parallel=False, groups=runtime.groups)
    router.bias.data.zero_()
    logits_TE = random(9, 6) - 80.0
    routing = router.route(logits_TE, None, "train", 1)
    assert routing.router_stats.probs_BE.sum().item() == pytest.approx(9.0)
    torch.testing.assert_close(routing.gates_TK.sum(1), torch.ones(9))


def test_the_loss_counts_scores_or_assignments(runtime: Runtime) -> None:
    """A bias that sends all tokens to the two worst experts: scores say the two best, assignments what was chosen."""
    logits_TE = torch.tensor([[4.0, 3.0, 1.0, 0.0]]).repeat(5, 1)
    padding_T = torch.tensor([False, False, False, False, True])
    for counts, wanted in (("scores", [[0, 1]] * 4 + [[4, 4]]), ("assignments", None)):
        moe = MoeConfig(num_experts=4, top_k=2, bias_update_rate=0.1, aux_loss_counts=counts)
        router = Router(ModelConfig(hidden_size=8, moe=moe), sequence_parallel=False, groups=runtime.groups)
        router.bias.data.copy_(torch.tensor([-9.0, -9.0, 9.0, 9.0]))
        routing = router.route(logits_TE, padding_T, "train", 1)
        assert routing.experts_TK[:4].sort(1).values.tolist() == [[2, 3]] * 4
        assert (None if routing.counted_TK is None else routing.counted_TK.tolist()) == wanted


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2])
def test_forced_balance_spreads_tokens_evenly_and_keeps_the_gradient(score_function, groups, runtime):
    """Of a router that prefers one expert; evaluation routes as the router wants."""
    changes: dict[str, Any] = {
        "num_experts": 8,
        "top_k": 2,
        "score_function": score_function,
        "num_expert_groups": groups,
    }
    router = router_of(tiny(MoeConfig(**changes, force_balance=True)), runtime)
    free = router_of(tiny(MoeConfig(**changes)), runtime)
    x_TD = random(32, router.weight.shape[1]).float().requires_grad_()
    with torch.no_grad():
        for each in (router, free):
            each.weight[3] += 5 * x_TD.mean(0)
    routing = router(x_TD, mode=TRAIN)
    assert routing.experts_TK.flatten().bincount(minlength=8).tolist() == [8] * 8
    assert routing.experts_TK[1].sort().values.tolist() == [2, 3]
    (routing.gates_TK * random(32, 2)).sum().backward()
    assert router.weight.grad.norm() > 0 and x_TD.grad.norm() > 0
    assert torch.equal(router(x_TD, mode=EVALUATE).experts_TK, free(x_TD, mode=EVALUATE).experts_TK)
