"""Losses, norms and rotary positions in C++: against plain torch in fp64, value by value, and when they are chosen.

Legend: T tokens, V vocabulary, R rows, D hidden, S sequence, B batch, H heads, N width of a head.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conf.schema import ParallelConfig
from models.rope import Rotary
from ops import rotary
from ops.cpp import operators, rows
from ops.cpp.attention import apply_rotary, causal_attention
from ops.cross_entropy import CROSS_ENTROPY, _Alone, token_losses
from ops.implementations import Ops
from ops.norm import RMS_NORM, rms_norm_in_blocks
from ops.operation import Row
from ops.rotary import ROTARY
from ops.run_context import RunContext
from parallel.env import World
from parallel.process_groups import Runtime
from tests.models.test_attention import attend, attention_of
from tests.moe import reference_attention
from tests.moe.helpers import in_float64, random, run_context, selected, tiny
from tests.ops.cpp_kernels import available
from tests.parallel.helpers import started

pytestmark = pytest.mark.usefixtures("poisoned", "cpp_kernels")
CPU, HALF = torch.device("cpu"), 2.0**-8
"""HALF: a unit of the last of bf16's 8 bits is twice this, and rounding is off by half of that."""


def assert_rounded(got: Tensor, exact: Tensor, off: float = 1e-6) -> None:
    """Value by value: rounded to bf16, of what fp32 has right to `off` of the largest value of its row."""
    bar = HALF * exact.abs() + off * exact.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert got.dtype == torch.bfloat16 and ((got.double() - exact).abs() <= bar).all()


def case(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are huge, far below zero, all alike, and but for two values minus infinity; labels at both ends."""
    logits_TV = 3 * random(7, vocabulary)
    logits_TV[1] += 1000
    logits_TV[2] -= 1000
    logits_TV[3] = 0
    logits_TV[4, : vocabulary - 2] = -torch.inf
    labels_T = torch.tensor([0, 1, vocabulary - 1, vocabulary // 2, vocabulary - 1, vocabulary // 3, 0])
    return logits_TV.bfloat16(), labels_T, random(7, seed=1)


def losses_in_float64(logits_TV: Tensor, labels_T: Tensor, grad_T: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits_TV.double().requires_grad_()
    losses_T = F.cross_entropy(leaf, labels_T, reduction="none")
    losses_T.backward(grad_T.double())
    return losses_T.detach(), leaf.grad


@pytest.mark.parametrize("vocabulary", [3, 16, 1001])
def test_losses_and_gradients(vocabulary: int) -> None:
    logits_TV, labels_T, grad_T = case(vocabulary)
    values, gradient = losses_in_float64(logits_TV, labels_T, grad_T)
    leaf = logits_TV.clone().requires_grad_()
    losses_T = rows.token_losses(leaf * 1, labels_T, _Alone())
    losses_T.backward(grad_T)
    assert losses_T.dtype == torch.float32
    torch.testing.assert_close(losses_T.double(), values, rtol=1e-6, atol=1e-6)
    assert_rounded(leaf.grad, gradient)


def cut(world: World) -> tuple[Tensor, Tensor]:
    """Losses and this rank's slice of the gradient (rank function)."""
    with available(), started(world, ParallelConfig(tp=world.size)) as runtime:
        logits_TV, labels_T, grad_T = case(1000)
        leaf = logits_TV.chunk(world.size, 1)[dist.get_rank()].clone().requires_grad_()
        losses_T = rows.token_losses(leaf * 1, labels_T, runtime.groups.tp)
        losses_T.backward(grad_T)
        return losses_T.detach(), leaf.grad


def test_a_vocabulary_cut_over_ranks(ranks) -> None:
    """Of one token all logits of the first slice are minus infinity."""
    every = ranks.run(2, cut, timeout=120)
    values, gradient = losses_in_float64(*case(1000))
    for losses_T, _ in every:
        torch.testing.assert_close(losses_T.double(), values, rtol=1e-6, atol=1e-6)
    assert_rounded(torch.cat([grad for _, grad in every], 1), gradient)


@pytest.mark.parametrize(("count", "hidden"), [(1, 1), (5, 16), (150, 200)])
def test_norms(count: int, hidden: int) -> None:
    """More rows than a part, rows of very different size, one so small that eps decides, a strided gradient."""
    x_RD, weight_D = random(count, hidden).bfloat16(), random(hidden, seed=1).bfloat16()
    x_RD[0] *= 1e-4
    x_RD[-1] *= 1e3
    leaves = [x_RD.requires_grad_(), weight_D.requires_grad_()]
    dy_RD = random(hidden, count, seed=2).t().bfloat16()
    y_RD = rows.rms_norm(*leaves, 1e-6)
    dx_RD, dweight_D = torch.autograd.grad(y_RD, leaves, dy_RD)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted_RD = F.rms_norm(exact[0], (hidden,), exact[1], 1e-6)
    wanted = torch.autograd.grad(wanted_RD, exact, dy_RD.double())
    assert_rounded(y_RD, wanted_RD.detach())
    assert_rounded(dx_RD, wanted[0], off=1e-5)  # what is along x cancels
    assert_rounded(dweight_D, wanted[1])


@pytest.mark.parametrize("width", [2, 8, 40, 64])
def test_rotation_is_a_complex_multiplication(width: int) -> None:
    """Forward and back, on heads that lie beside others, with the angles of two sequences of their own positions."""
    positions_BS = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    cos, sin = Rotary(width, 100.0, 8)(positions_BS.t())
    x_SBHN = random(5, 2, 3, width + 6).bfloat16()[..., 6:]
    pair = torch.complex(*x_SBHN.double().chunk(2, -1))
    angle = positions_BS.t()[..., None, None] * 100.0 ** -(torch.arange(0, width, 2) / width)
    for backward, way in ((False, 1), (True, -1)):
        rotated = pair * torch.polar(torch.ones_like(angle.double()), way * angle.double())
        room = torch.empty(5, 3, 2, width, dtype=torch.bfloat16).transpose(1, 2)
        got = apply_rotary(x_SBHN, cos, sin, room, backward=backward)
        assert_rounded(got, torch.cat([rotated.real, rotated.imag], -1))


@pytest.mark.parametrize("groups", [4, 2])
def test_a_layer_of_attention_on_both(groups: int, runtime: Runtime) -> None:
    """As far from the float64 reference as bf16 is, output and gradients."""
    model = tiny(hidden_size=64, num_attention_heads=4, num_query_groups=groups, rope_theta=100.0)
    layer = attention_of(model, runtime).bfloat16()
    layer.ops = Ops(causal_attention=causal_attention, apply_rotary=apply_rotary)
    positions_BS = torch.arange(40).expand(2, -1)
    x_SBD, above_SBD = random(40, 2, 64).bfloat16(), random(40, 2, 64, seed=9).bfloat16()
    x64_SBD, weights = x_SBD.double().requires_grad_(), in_float64(layer)
    whole = [reference_attention.attention(x64_SBD[:, b], weights, model, [*range(40)], False) for b in range(2)]
    wanted_SBD = torch.stack(whole, dim=1)
    (wanted_SBD * above_SBD).sum().backward()
    x_SBD.requires_grad_()
    out_SBD = attend(layer, x_SBD, positions_BS, False, model.rope_theta)
    out_SBD.backward(above_SBD)
    pairs = [(out_SBD, wanted_SBD), (x_SBD.grad, x64_SBD.grad)]
    pairs += [(p.grad, weights[name].grad) for name, p in layer.named_parameters()]
    for got, wanted in pairs:
        assert ((got.double() - wanted).norm() / wanted.norm()).item() < 0.01


def test_they_are_chosen_where_they_equal_torch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    context = run_context(tiny(hidden_size=64), runtime, torch.bfloat16, CPU)

    def chosen(context: RunContext = context) -> tuple[list[object], list[Row]]:
        found = [selected(operation, context) for operation in (RMS_NORM, CROSS_ENTROPY, ROTARY)]
        return [one for one, _ in found], [row for _, row in found]

    implementations, table = chosen()
    assert implementations == [rows.rms_norm, rows.token_losses, apply_rotary]
    assert {row.name for row in table} == {"native"}
    assert chosen(replace(context, dtype=torch.float32))[0] == [rms_norm_in_blocks, token_losses, rotary.apply_rotary]
    right = rows.rms_norm, rows.token_losses
    monkeypatch.setattr("ops.cpp.rows.rms_norm", lambda x, w, eps: right[0](x, w, eps) * 1.05)
    monkeypatch.setattr("ops.cpp.rows.token_losses", lambda *a: right[1](*a) * 1.05)
    monkeypatch.setattr("ops.cpp.attention.apply_rotary", lambda *a, backward: apply_rotary(*a))
    implementations, table = chosen()
    assert [row.name for row in table] == ["blocks of rows in cache", "torch, in blocks", "torch, in blocks"]
    assert implementations[1] is token_losses
    assert all("native differs from torch's by" in row.why and row.refused for row in table)
    operators._load_error.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, table = chosen()
    assert {row.name for row in table} == {"blocks of rows in cache", "torch, in blocks"}
    for row in table:
        assert "native is compiled when it is first used, and there is no C++ compiler" in row.why and row.refused
