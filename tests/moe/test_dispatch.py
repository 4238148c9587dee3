"""Rows to experts and back, on one rank; over several ranks the whole layer is compared in tests/parallel."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.dispatch import Choices, LocalDispatcher
from parallel.runtime import Runtime
from tests.moe.helpers import random

EXPERTS_TK = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
KEEP_TK = torch.tensor([[True, True], [False, True], [True, False], [True, False]])


def names(experts_TK: Tensor) -> Tensor:
    """Choices named 0, 1, 2, ... in the order of (token, choice)."""
    return torch.arange(experts_TK.numel(), device=experts_TK.device).view_as(experts_TK)


def test_rows_are_sorted_by_expert_and_within_it_by_token(runtime: Runtime) -> None:
    """Drawn by hand, token t carrying the value t: expert 0 gets tokens 0 and 3, expert 1 gets 1, expert 2 gets 0 and
    2; token 1's first choice, token 2's second and token 3's second are dropped."""
    x_TD = torch.arange(4.0, device=runtime.device).unsqueeze(1)
    experts_TK, keep_TK = EXPERTS_TK.to(runtime.device), KEEP_TK.to(runtime.device)
    dispatcher = LocalDispatcher(3)
    sent = dispatcher.finish(dispatcher.start(x_TD, Choices(experts_TK, keep_TK.float(), keep_TK, names(experts_TK))))
    assert sent.rows_RD.flatten().tolist() == [0, 3, 1, 0, 2]
    assert sent.counts == [2, 1, 2]
    assert sent.names_R.tolist() == [1, 6, 3, 0, 4]  # token * 2 + choice


def test_combine_is_the_gated_sum_of_the_kept_choices(runtime: Runtime) -> None:
    """The same case; expert e answers 10^e. Token 0: 0.5 * 100 + 0.25 * 1, and so on."""
    dispatcher = LocalDispatcher(3)
    experts_TK, keep_TK = EXPERTS_TK.to(runtime.device), KEEP_TK.to(runtime.device)
    gates_TK = torch.tensor([[0.5, 0.25], [0.7, 0.3], [0.6, 0.4], [0.8, 0.2]], device=runtime.device)
    sent = dispatcher.start(torch.zeros(4, 1, device=runtime.device), Choices(experts_TK, gates_TK, keep_TK))
    y_RD = torch.tensor([[1.0], [1.0], [10.0], [100.0], [100.0]], device=runtime.device)
    out_TD = dispatcher.combine(y_RD, sent)
    assert torch.allclose(out_TD.cpu().flatten(), torch.tensor([50.25, 3.0, 60.0, 0.8]))


@given(tokens=st.integers(1, 9), top_k=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_experts_that_do_nothing_give_each_token_back_times_its_kept_gates(
    tokens: int, top_k: int, seed: int, runtime: Runtime
) -> None:
    x_TD = random(tokens, 4, seed=seed).double().to(runtime.device)
    experts_TK = random(tokens, 5, seed=seed).argsort(1)[:, :top_k].to(runtime.device)
    keep_TK = (random(tokens, top_k, seed=seed + 1) > 0).to(runtime.device)
    gates_TK = random(tokens, top_k, seed=seed + 2).double().to(runtime.device)
    dispatcher = LocalDispatcher(5)
    # With slots for all that may come, rows of zeros stand between.
    for slots in (None, tokens):
        sent = dispatcher.start(x_TD, Choices(experts_TK, gates_TK, keep_TK, names(experts_TK)), slots)
        owner = [e for e, n in enumerate(sent.counts) for _ in range(n)]
        taken = sent.rows_RD.any(1)
        assert [o for o, t in zip(owner, taken, strict=True) if t] == experts_TK.flatten()[sent.names_R[taken]].tolist()
        assert taken.sum() == keep_TK.sum() and len(sent.rows_RD) == sum(sent.counts)
        out_TD = dispatcher.combine(sent.rows_RD, sent)
        assert torch.allclose(out_TD, x_TD * (gates_TK * keep_TK).sum(1, keepdim=True))
