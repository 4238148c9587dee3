"""The router's product in C++: against fp64, value by value, and when it is chosen.

Legend: T tokens, D hidden, E experts.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conf.schema import MoeConfig
from moe.router import Router
from ops import routing
from ops.cpp import operators
from ops.cpp.router import router_logits
from ops.implementations import Ops
from ops.routing import ROUTER_LOGITS
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_context, selected, tiny
from tests.ops.test_cpp_rows import assert_rounded

pytestmark = pytest.mark.usefixtures("poisoned", "cpp_kernels")
CPU = torch.device("cpu")


def operands(tokens: int, hidden: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Strided tokens and gradients."""
    x_TD, weight_ED = random(hidden, tokens).t().bfloat16(), random(experts, hidden, seed=1)
    return x_TD, weight_ED, random(experts, tokens, seed=2).t()


def there_and_back(logits: routing.RouterLogits, x_TD: Tensor, weight_ED: Tensor, grad_TE: Tensor) -> list[Tensor]:
    leaves = [x_TD.detach().requires_grad_(), weight_ED.detach().requires_grad_()]
    logits_TE = logits(*leaves)
    return [logits_TE.detach(), *torch.autograd.grad(logits_TE, leaves, grad_TE)]


@pytest.mark.parametrize("hidden", [1, 16, 90, 200])
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 1), (7, 3), (300, 8), (513, 5)])
def test_values_are_those_of_fp64(tokens: int, hidden: int, experts: int) -> None:
    x_TD, weight_ED, grad_TE = operands(tokens, hidden, experts)
    logits_TE, dx_TD, dweight_ED = there_and_back(router_logits, x_TD, weight_ED, grad_TE)
    x, weight, grad = x_TD.double(), weight_ED.double(), grad_TE.double()
    # What rounding to fp32 can do to a sum is a part of the sum of sizes.
    for got, a, b in ((logits_TE, x, weight.t()), (dweight_ED, grad.t(), x)):
        assert got.dtype == torch.float32 and ((got - a @ b).abs() <= 1e-6 * (a.abs() @ b.abs())).all()
    if tokens:
        assert_rounded(dx_TD, grad @ weight)


def test_a_token_is_the_same_wherever_it_lies_and_a_sum_for_any_threads() -> None:
    x_TD, weight_ED, grad_TE = operands(30, 200, 7)
    whole = there_and_back(router_logits, x_TD, weight_ED, grad_TE)
    for first in (0, 1, 3):
        logits_TE, dx_TD, _ = there_and_back(router_logits, x_TD[first:], weight_ED, grad_TE[first:])
        assert torch.equal(logits_TE, whole[0][first:]) and torch.equal(dx_TD, whole[1][first:])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = there_and_back(router_logits, x_TD, weight_ED, grad_TE)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, again, whole))


def test_it_is_chosen_where_it_equals_torch(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    model = tiny(MoeConfig(num_experts=4, top_k=2), hidden_size=64)
    context = run_context(model, runtime, torch.bfloat16, CPU)
    logits, row = selected(ROUTER_LOGITS, context)
    assert logits is router_logits and row.name == "native"
    built = Router(model, sequence_parallel=False, groups=runtime.groups, ops=Ops(router_logits=logits))
    built.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x_TD = random(9, 64).bfloat16()
    wanted_TE = x_TD.double() @ built.weight.double().t()
    assert torch.equal(built(x_TD).experts_TK, wanted_TE.topk(model.moe.top_k).indices)
    assert selected(ROUTER_LOGITS, replace(context, dtype=torch.float32))[0] is routing.router_logits
    jitter = run_context(tiny(MoeConfig(num_experts=4, jitter=0.01)), runtime, torch.bfloat16, CPU)
    plain, row = selected(ROUTER_LOGITS, jitter)
    assert plain is routing.router_logits and "native takes tokens in bf16, and jitter makes" in row.why
    assert not row.refused
    monkeypatch.setattr("ops.cpp.router.router_logits", lambda x, w: router_logits(x, w) * 1.01)
    plain, row = selected(ROUTER_LOGITS, context)
    assert plain is routing.router_logits and "native differs from torch's by" in row.why and row.refused
    operators._load_error.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler" in selected(ROUTER_LOGITS, context)[1].why
