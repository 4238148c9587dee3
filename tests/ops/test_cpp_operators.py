"""torch.ops.switchyard as PyTorch sees it: schemas, gradients, meta tensors, torch.compile, arguments that do not fit.

Values are compared with references in test_cpp*.py and test_permute.py.
"""

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.cpp.attention import causal_attention
from ops.cpp.operators import FAKES, GRADIENTS
from ops.cpp.router import router_logits
from ops.cpp.rows import rms_norm
from tests.moe.helpers import random

pytestmark = pytest.mark.usefixtures("cpp_kernels")


def half(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).bfloat16()


def operator(name: str) -> Any:
    return getattr(torch.ops.switchyard, name).default


def arguments() -> dict[str, tuple[Any, ...]]:
    """Of every operator: B 2, H 4, G 2, S 5, N 8; six tokens of 20 values, three choices; three experts."""
    q, k, v = half(2, 5, 4, 8).transpose(1, 2), half(2, 2, 5, 8, seed=1), half(5, 2, 2, 8, seed=2).permute(1, 2, 0, 3)
    out, angle = half(2, 4, 5, 8, seed=3), random(5, 2, 1, 4)
    x_RK, groups, rows = half(6, 20), torch.tensor([0, 4, 4, 6]), torch.tensor([5, 0, 0, 3, 2, 1])
    w_LKN, dy_RN = half(3, 16, 20, seed=1).transpose(1, 2), half(6, 16, seed=2)
    h_RGF, keep_RF = half(6, 2, 10), half(6, 10, seed=1)
    choice_R, slot = torch.tensor([2, 0, 9, 18, 17]), torch.tensor([1, -1, 0, *[-1] * 6, 2, *[-1] * 7, 4])
    gates_TK, labels_T = random(6, 3), torch.tensor([0, 19, 3, -5, 40, 7])
    weight_D, weight_ED = half(20, seed=1), random(3, 20, seed=1)
    return {
        "causal_attention": (q, k, v),
        "causal_attention_backward": (out, q, k, v, *operator("causal_attention")(q, k, v)),
        "apply_rotary": (half(5, 2, 3, 8), angle.cos(), angle.sin(), torch.zeros(5, 2, 3, 8).bfloat16(), True),
        "grouped_product": (x_RK, rows, w_LKN, groups),
        "grouped_weight_gradient": (x_RK, None, dy_RN, groups),
        "grouped_weight_gradient_add_": (random(3, 20, 16), x_RK, rows, dy_RN, groups),
        "activate": (h_RGF, 0, keep_RF),
        "activate_backward_": (half(6, 10, seed=2), h_RGF, 1, None),
        "gather_rows": (x_RK, choice_R, gates_TK, 3),
        "add_rows": (half(5, 20), slot, gates_TK, 6, 3),
        "gate_gradient": (half(5, 20), slot, x_RK, 3),
        "router_logits": (x_RK, weight_ED),
        "router_logits_backward": (random(6, 3, seed=2), x_RK, weight_ED),
        "cross_entropy_sums": (x_RK, labels_T),
        "cross_entropy_gradient_": (x_RK.clone(), labels_T, *(random(6, seed=s).abs() + 1 for s in range(3))),
        "rms_norm": (x_RK, weight_D, 1e-5),
        "rms_norm_backward": (half(6, 20, seed=2), x_RK, weight_D, random(6).abs()),
    }


def own(name: str) -> tuple[Any, ...]:
    """Copies with the same strides; what an operator has gradients of requires them."""
    trained = name in GRADIENTS
    return tuple(
        a.detach().clone().requires_grad_(trained and a.is_floating_point()) if isinstance(a, Tensor) else a
        for a in arguments()[name]
    )


@pytest.mark.parametrize("name", FAKES)
def test_every_operator_is_what_it_says(name: str) -> None:
    """Its schema, its gradient, and the same under torch.compile with sizes that are not known."""
    torch.library.opcheck(operator(name), own(name))


@pytest.mark.parametrize("name", FAKES)
def test_meta_tensors_have_the_shapes_of_others(name: str) -> None:
    def described(results: Any) -> list[tuple[Any, ...]]:
        results = results if isinstance(results, tuple) else () if results is None else (results,)
        return [(r.shape, r.stride(), r.dtype) for r in results]

    given = own(name)
    meta = operator(name)(*(a.to("meta") if isinstance(a, Tensor) else a for a in given))
    assert described(meta) == described(operator(name)(*given))
    assert all(r.is_meta for r in (meta if isinstance(meta, tuple) else [meta]) if r is not None)


def test_a_layer_that_is_compiled_computes_the_same() -> None:
    """In one graph, forward and backward."""

    def layer(x_RD: Tensor, weight_D: Tensor, w_ED: Tensor) -> Tensor:
        y_RD = rms_norm(x_RD, weight_D, 1e-5)
        heads = y_RD.view(2, 12, 4, 16).transpose(1, 2)
        return router_logits(causal_attention(heads, heads, heads).transpose(1, 2).reshape(24, 64), w_ED)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [half(24, 64).requires_grad_(), half(64, seed=1).requires_grad_(), random(5, 64).requires_grad_()]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, compiled, run(layer)))


def test_a_second_derivative_is_refused() -> None:
    x_TD, w_ED = half(4, 8).requires_grad_(), random(3, 8).requires_grad_()
    (dx_TD,) = torch.autograd.grad(router_logits(x_TD, w_ED).square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx_TD.float().sum().backward()


REFUSED = [
    ("rms_norm", {0: lambda x: x.float()}, r"rms_norm takes input \[R, D\]"),
    ("rms_norm", {1: lambda w: w[1:]}, r"weight \[D\] in bf16"),
    ("causal_attention", {1: lambda k: k[:, :, :-1]}, r"causal_attention takes query"),
    (
        "causal_attention",
        {1: lambda k: k[:, [0, 1, 1]], 2: lambda v: v[:, [0, 1, 1]]},
        "multiple of the key/value heads",
    ),
    ("router_logits", {1: lambda w: w.bfloat16()}, r"weight \[E, D\] in fp32"),
    ("grouped_product", {3: lambda g: g + 1}, "groups must rise from 0 to the number of rows"),
    ("grouped_product", {3: lambda g: g[[0, 2, 1, 3]] - torch.tensor([0, 0, 1, 0])}, "groups must rise"),
    ("grouped_product", {1: lambda rows: rows + 1}, "rows of the input"),
    ("grouped_product", {2: lambda w: w[:2]}, r"weight must be \[experts, K, N\]"),
    ("gather_rows", {1: lambda choice: choice - 1}, r"choices from 0 to T \* K"),
    ("gather_rows", {1: lambda choice: choice + 1}, r"choices from 0 to T \* K"),
    ("add_rows", {1: lambda slot: slot + 1}, "slots must be rows, or -1"),
    ("activate", {1: lambda kind: 5}, "there is no such activation"),
    ("activate", {1: lambda kind: -1}, "there is no such activation"),
    ("activate_backward_", {0: lambda grad: grad.t().contiguous().t()}, "contiguous"),
    ("cross_entropy_gradient_", {0: lambda logits: logits.t().contiguous().t()}, "contiguous logits"),
    ("grouped_weight_gradient_add_", {0: lambda main: main.bfloat16()}, "in fp32 and contiguous"),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, changes: dict[int, Callable[[Any], Any]], words: str) -> None:
    given = list(own(name))
    for place, change in changes.items():
        given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=words):
        operator(name)(*given)


def test_no_memory_is_an_error_with_words() -> None:
    """Of operands that 64 threads would pack into gigabytes, of which the process gets none."""
    x_RK, w_LKN, groups = half(1, 2**19), half(1, 2**19, 1), torch.tensor([0, 1])
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    threads = torch.get_num_threads()
    torch.set_num_threads(64)
    resource.setrlimit(resource.RLIMIT_AS, (1, most))
    try:
        with pytest.raises(RuntimeError) as failure:
            operator("grouped_product")(x_RK, None, w_LKN, groups)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
        torch.set_num_threads(threads)
    assert "not enough memory to pack the operands of a product" in str(failure.value)
    y_RN, exact = operator("grouped_product")(x_RK, None, w_LKN, groups), x_RK.double() @ w_LKN[0].double()
    assert abs(y_RN.item() - exact.item()) <= 2**-8 * abs(exact.item()) + 1e-2
