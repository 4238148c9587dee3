"""Recompute changes what is kept and nothing else: not the numbers, not the routing, not the counts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measurement import saved_bytes
from conf.schema import MoeConfig, ParallelConfig
from moe.router import Router
from parallel.activation_checkpoint import checkpoint_without_output
from parallel.batch_context import BatchContext
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import force_experts, random, run_layer, sparse_layer, tiny, whole_model
from tests.parallel.helpers import Variant, measure

MOE = MoeConfig(num_experts=4, top_k=2, every=2, capacity_factor=1.0)
CHOICES = [["norm"], ["activation"], ["moe"], ["norm", "activation", "moe"], ["full"]]
TOKENS_BS = torch.randint(0, 16, (3, 16), generator=torch.Generator().manual_seed(0))
POSITIONS_BS = torch.arange(16).expand(3, -1)


def run(recompute: list[str], runtime: Runtime) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Gradients, statistics and kept bytes of a model with a dense and a sparse layer."""
    model = whole_model(tiny(MOE, recompute=recompute), runtime)
    inputs = [t.to(runtime.device) for t in (TOKENS_BS, POSITIONS_BS, TOKENS_BS)]
    model(*inputs, BatchContext(loss_scale=0.5)).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    counted = dict(model.named_buffers())
    return (
        gradients,
        {n: b.clone() for n, b in counted.items() if "statistics" in n},
        saved_bytes(lambda: model(*inputs)),
    )


def test_only_memory_changes_and_loads_are_counted_once(runtime: Runtime) -> None:
    gradients, counted, kept = run([], runtime)
    assert counted["layers.1.ffn.statistics.sums"][0] == 48  # tokens
    sizes = {}
    for recompute in CHOICES:
        again, counted_again, sizes[tuple(recompute)] = run(recompute, runtime)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, again[name]), (recompute, name)
        for name, buffer in counted.items():
            assert torch.equal(buffer, counted_again[name]), (recompute, name)
    full, alone = sizes[("full",)], [sizes[(part,)] for part in CHOICES[0] + CHOICES[1] + CHOICES[2]]
    assert full < sizes[("norm", "activation", "moe")] < min(alone) and max(alone) < kept


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_no_activation_of_an_expert_is_kept(activation: str, backend: str, runtime: Runtime) -> None:
    """With 48 choices of hidden width 64: what stays is the first products, the answers and little of the routing."""
    held = []
    for recompute in ([], ["activation"]):
        model = tiny(MOE, hidden_size=8, ffn_hidden_size=64, activation=activation, recompute=recompute)
        layer = sparse_layer(model, runtime, backend=backend)
        x_SBD = random(12, 2, 8).to(runtime.device).requires_grad_()
        held.append(saved_bytes(partial(run_layer, layer, x_SBD)))
    hidden_bytes, gates = 48 * 64 * 4, 2 if activation == "swiglu" else 1
    assert held[1] < (gates + 1) * hidden_bytes < held[0]


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
def test_a_near_tie_is_not_decided_again(drop_policy: str, runtime: Runtime) -> None:
    """Between the two passes the router is changed so little that only ties could notice, and all tokens are ties: a
    choice taken again would fall on the other expert, and capacity would drop another token. The gradients must be
    those of the first choice."""
    moe = MoeConfig(num_experts=2, capacity_factor=1.0, drop_policy=drop_policy, aux_loss_coeff=0.0, z_loss_coeff=0.0)
    gradients = []
    for recompute in ([], ["moe"]):
        layer = sparse_layer(tiny(moe, recompute=recompute), runtime)
        x_SBD = force_experts(layer, random(6, 1, 8), [0] * 6).to(runtime.device)
        tilt_E = torch.tensor([1e-5, 0.0], device=runtime.device)
        layer.router.weight.data[:] = tilt_E[:, None] * torch.tensor([1.0] + 7 * [0.0], device=runtime.device)
        out_SBD = run_layer(layer, x_SBD)
        assert [bool(row.any()) for row in out_SBD.flatten(0, 1)] == 3 * [True] + 3 * [False]
        nudge(layer.router)
        retaken = layer.router(x_SBD.flatten(0, 1)).experts_TK
        assert (retaken == 1).all()  # the nudge is enough to turn every token round
        out_SBD.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    assert not gradients[1]["experts.w_in"][1].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def nudge(router: Router) -> None:
    # .data: autograd would refuse to go back through a weight that it saw change
    router.weight.data[0, 0] -= 2e-5


def test_a_recomputed_output_is_the_consumers_only_copy(runtime: Runtime) -> None:
    """Views, several uses and a second backward pass included; the tensor itself is gone between the passes."""
    norm, linear = nn.LayerNorm(8).to(runtime.device), nn.Linear(4, 4).to(runtime.device)
    x, other = (random(6, 8).to(runtime.device).requires_grad_() for _ in range(2))

    def consumer(normed: Tensor) -> Tensor:
        return (linear(normed.view(12, 4)[2:]).sin() * normed.view(12, 4)[2:]).sum() + normed.square().sum()

    wanted = torch.autograd.grad(consumer(norm(x)), [x, *norm.parameters(), *linear.parameters()])
    loss = checkpoint_without_output(norm, [other], consumer)
    for _ in range(2):
        got = torch.autograd.grad(loss, [other, *norm.parameters(), *linear.parameters()], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    plain = saved_bytes(lambda: consumer(norm(x)))
    assert saved_bytes(lambda: checkpoint_without_output(norm, [x], consumer)) <= plain - x.numel() * 4


def test_recompute_under_a_layout(ranks: RankPool) -> None:
    """The exchanges of the sparse layers run again in the backward pass, in the same order on all ranks."""
    parallel = ParallelConfig(tp=2, sequence_parallel=True, ep=2, pp=2)
    plain = Variant({"qk_norm": "full"}, {"drop_policy": "probability"})
    again = {c[-1]: replace(plain, model=plain.model | {"recompute": c}) for c in (["norm", "moe"], ["full"])}
    variants = {"plain": plain, **again}
    for outcomes in ranks.run(4, measure, parallel, variants, 2):
        for name in ("moe", "full"):
            assert outcomes[name].losses == outcomes["plain"].losses
            assert outcomes[name].norms == pytest.approx(outcomes["plain"].norms, rel=1e-6)
            assert (outcomes[name].load_SLE == outcomes["plain"].load_SLE).all()
            assert (outcomes[name].dropped_SL == outcomes["plain"].dropped_SL).all()
