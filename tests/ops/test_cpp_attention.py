"""Causal attention in C++: against plain torch in fp64 value by value, and when it is chosen.

Legend: B batch, H heads, G key/value groups, S sequence, N width of a head.
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.schema import TrainConfig
from ops.attention import ATTENTION, CausalAttention, torch_attention
from ops.cpp import build, operators
from ops.cpp.attention import causal_attention
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_context, selected, tiny

here = pytest.mark.usefixtures("cpp_kernels")
pytestmark = pytest.mark.usefixtures("poisoned")
CPU = torch.device("cpu")


def inputs(b: int, h: int, g: int, s: int, n: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, in bf16; q lies in memory as rotation leaves it, the others as
    projections do, beside other values."""
    q_BHSN, k_SBGN, v_SBGN, above_SBHN = (
        random(*shape, seed=i).bfloat16()
        for i, shape in enumerate(((b, h, s, n), (s, b, g, n + 8), (s, b, g, n + 8), (s, b, h, n + 8)))
    )
    return [q_BHSN, *(t[..., 8:].permute(1, 2, 0, 3) for t in (k_SBGN, v_SBGN, above_SBHN))]


def results(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, above: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), above)]


def in_float64(q: Tensor, k: Tensor, v: Tensor, above: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(the output and the gradients by their formulas; how far each may be off). What is rounded to bf16, to half a
    unit of the last of 8 bits, are shares and their gradients before a product, and results; sums are nearly exact."""
    group = q.shape[1] // k.shape[1]
    q, k, v, above = (t.double() for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), above))
    s, scale, half = q.shape[2], 1 / math.sqrt(q.shape[3]), 2.0**-8
    score = (q @ k.mT * scale).masked_fill(~torch.ones(s, s).tril().bool(), -math.inf)
    p = score.softmax(-1)
    out, dp = p @ v, above @ v.mT
    inner = (above * out).sum(-1, keepdim=True)
    ds = p * (dp - inner) * scale
    off_p = half * p
    off_out = off_p @ v.abs() + half * out.abs()
    off_inner = (above.abs() * off_out).sum(-1, keepdim=True)  # taken of the output as it was kept
    off_ds = half * ds.abs() + p * off_inner * scale

    def summed(t: Tensor) -> Tensor:
        """Over the heads of a group."""
        return t.unflatten(1, (-1, group)).sum(2)

    exact = [out, ds @ k, summed(ds.mT @ q), summed(p.mT @ above)]
    off = [off_out, off_ds @ k.abs(), summed(off_ds.mT @ q.abs()), summed(off_p.mT @ above.abs())]
    return exact, [o + half * e.abs() + 1e-5 * max(1.0, e.abs().max()) for o, e in zip(off, exact, strict=True)]


def assert_as_good_as_rounding(tensors: list[Tensor]) -> None:
    exact, off = in_float64(*tensors)
    got = results(causal_attention, *tensors)
    for name, one, wanted, bar in zip(("out", "dq", "dk", "dv"), got, exact, off, strict=True):
        assert ((one.double() - wanted).abs() <= bar).all(), name


@here
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    each=st.integers(1, 3),
    sequence=st.sampled_from([1, 2, 11, 12, 13, 31, 33, 47, 48, 49, 97]),
    width=st.sampled_from([1, 2, 7, 16, 33, 64]),
)
@example(batch=1, groups=1, each=2, sequence=513, width=64)  # one more key than a block of the backward pass has
@example(batch=1, groups=1, each=1, sequence=1100, width=128)
def test_it_is_that_of_fp64(batch: int, groups: int, each: int, sequence: int, width: int) -> None:
    assert_as_good_as_rounding(inputs(batch, groups * each, groups, sequence, width))


@here
def test_by_hand() -> None:
    """Both keys score alike, so that the second token takes the mean of both values and the first its own."""
    q, k = torch.zeros(1, 1, 2, 4).bfloat16(), torch.ones(1, 1, 2, 4).bfloat16()
    v = torch.tensor([[[[1.0, 2, 3, 4], [3, 2, 1, 8]]]]).bfloat16()
    assert causal_attention(q, k, v).tolist() == [[[[1, 2, 3, 4], [2, 2, 2, 6]]]]


@here
def test_large_scores_do_not_overflow() -> None:
    """e to the largest of them is far beyond fp32."""
    q, k, v, above = inputs(1, 2, 1, 60, 16)
    q, k = 30 * q, 30 * k
    assert (q.float() @ k.float().mT / 4).max() > 1000
    assert_as_good_as_rounding([q, k, v, above])


@here
def test_tokens_to_come_change_nothing() -> None:
    """Bit for bit: outputs before token 50, and what they send back."""
    tensors = inputs(2, 4, 2, 90, 32)
    tensors[3][:, :, 50:] = 0
    changed = [t.clone() for t in tensors]
    for t in changed[:3]:
        t[:, :, 50:] = random(*t[:, :, 50:].shape, seed=9).bfloat16()
    for got, wanted in zip(results(causal_attention, *changed), results(causal_attention, *tensors), strict=True):
        assert torch.equal(got[:, :, :50], wanted[:, :, :50])


@here
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_every_number_of_threads_gives_the_same_bits(threads: int) -> None:
    """Seven threads share three heads: each head is cut into runs of queries."""
    tensors, before, found = inputs(1, 3, 1, 200, 64), torch.get_num_threads(), []
    try:
        for number in (2, threads):
            torch.set_num_threads(number)
            found.append(results(causal_attention, *tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@here
def test_operands_whose_width_is_strided() -> None:
    tensors = inputs(1, 2, 2, 20, 16)
    apart = [t.mT.contiguous().mT for t in tensors]
    assert all(t.stride(3) != 1 for t in apart)
    got, wanted = results(causal_attention, *apart), results(causal_attention, *tensors)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def chosen(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    sequences: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
) -> tuple[object, str, str]:
    has = dict.fromkeys(build.INSTRUCTIONS, True) | {"amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    model, train = tiny(num_attention_heads=4, num_query_groups=1), TrainConfig(micro_batch_size=sequences)
    attend, row = selected(ATTENTION, run_context(model, runtime, dtype, device, train=train))
    return attend, row.name, row.why


@here
def test_it_is_chosen_where_it_equals_torch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, name, why = chosen(runtime, monkeypatch)
    assert (attend, name) == (causal_attention, "native") and "equals torch's within" in why
    monkeypatch.setattr("ops.cpp.attention.causal_attention", lambda q, k, v: causal_attention(q, k, v * 1.05))
    attend, name, why = chosen(runtime, monkeypatch)
    assert attend is torch_attention and "native differs from torch's by 5e-02 and is left out" in why


def test_where_it_is_not_chosen_the_table_says_why(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        ({"sequences": 1}, "native would leave threads idle: 1 key/value heads for 2"),
        ({"dtype": torch.float32}, "picks the fastest"),
        ({"device": torch.device("cuda")}, "picks the fastest"),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for changed, words in cases:
        attend, _, why = chosen(runtime, monkeypatch, **changed)
        assert attend is torch_attention and words in why
    operators._load_error.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler" in chosen(runtime, monkeypatch)[2]
    operators._load_error.cache_clear()
