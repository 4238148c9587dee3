"""Rows to experts and back, on one rank; over several ranks the whole layer is compared in tests/parallel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from conf.schema import MoeConfig, ParallelConfig
from moe.dispatcher import DISPATCHERS, LocalDispatcher, dispatcher_for
from ops.dispatch import Assignments
from ops.permute import TORCH_PERMUTATION
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import random
from tests.parallel.helpers import started

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
    sent = dispatcher.finish(
        dispatcher.start(x_TD, Assignments(experts_TK, keep_TK.float(), keep_TK, names(experts_TK)))
    )
    assert sent.rows.permute().flatten().tolist() == [0, 3, 1, 0, 2]
    assert sent.counts == [2, 1, 2]
    assert sent.names_R.tolist() == [1, 6, 3, 0, 4]  # token * 2 + choice


def test_combine_is_the_gated_sum_of_the_kept_choices(runtime: Runtime) -> None:
    """The same case; expert e answers 10^e. Token 0: 0.5 * 100 + 0.25 * 1, and so on."""
    dispatcher = LocalDispatcher(3)
    experts_TK, keep_TK = EXPERTS_TK.to(runtime.device), KEEP_TK.to(runtime.device)
    gates_TK = torch.tensor([[0.5, 0.25], [0.7, 0.3], [0.6, 0.4], [0.8, 0.2]], device=runtime.device)
    sent = dispatcher.start(torch.zeros(4, 1, device=runtime.device), Assignments(experts_TK, gates_TK, keep_TK))
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
        sent = dispatcher.start(x_TD, Assignments(experts_TK, gates_TK, keep_TK, names(experts_TK)), slots)
        owner = [e for e, n in enumerate(sent.counts) for _ in range(n)]
        taken = sent.rows.permute().any(1)
        assert [o for o, t in zip(owner, taken, strict=True) if t] == experts_TK.flatten()[sent.names_R[taken]].tolist()
        assert taken.sum() == keep_TK.sum() and len(sent.rows) == sum(sent.counts)
        out_TD = dispatcher.combine(sent.rows.permute(), sent)
        assert torch.allclose(out_TD, x_TD * (gates_TK * keep_TK).sum(1, keepdim=True))


def dispatched_without_values(dispatcher: LocalDispatcher, slots: int | None) -> Tensor:
    """A pass with tensors that have shapes but no values: whatever the host had to ask the device for, raises."""
    with FakeTensorMode():
        x_TD, gates_TK = torch.empty(6, 4, requires_grad=True), torch.empty(6, 2, requires_grad=True)
        choices = Assignments(torch.empty(6, 2, dtype=torch.int64), gates_TK, torch.empty(6, 2, dtype=torch.bool))
        sent = dispatcher.finish(dispatcher.start(x_TD, choices, slots))
        out_TD = dispatcher.combine(sent.rows.permute(), sent)
        out_TD.sum().backward()
    return out_TD


def test_with_slots_the_host_never_waits_for_the_device() -> None:
    assert dispatched_without_values(LocalDispatcher(5), slots=3).shape == (6, 4)
    with pytest.raises(DataDependentOutputException):
        dispatched_without_values(LocalDispatcher(5), slots=None)


class Questions(TorchFunctionMode):
    """Counts the values that the host asks for."""

    ASKED = ("tolist", "item", "cpu", "numpy", "nonzero", "bincount", "__bool__", "__int__", "__index__", "__float__")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in self.ASKED:
            self.asked.append(function.__name__)
        return function(*args, **(kwargs or {}))


def questions_of_ranks(world: World, name: str, slots: int | None) -> list[str]:
    with started(world, ParallelConfig(ep=2, etp=2)) as runtime:
        dispatcher = DISPATCHERS[name](4, 4, runtime.groups, TORCH_PERMUTATION)
        x_TD = random(6, 4, seed=world.rank).requires_grad_()
        experts_TK = random(6, 4, seed=world.rank).argsort(1)[:, :2]
        choices = Assignments(experts_TK, torch.ones(6, 2), torch.ones(6, 2, dtype=torch.bool))
        with Questions() as questions:
            sent = dispatcher.finish(dispatcher.start(x_TD, choices, slots))
            out_TD = dispatcher.combine(sent.rows.permute(), sent)
            out_TD.sum().backward()
        # Each of the two ranks of etp answered with the whole row.
        assert torch.allclose(out_TD, 4 * x_TD) and torch.allclose(x_TD.grad, torch.full((6, 4), 4.0))
        return questions.asked


@pytest.mark.parametrize("name", ["all_to_all", "all_gather"])
def test_the_host_asks_once_and_with_slots_never(name: str, ranks) -> None:
    assert ranks.run(4, questions_of_ranks, name, None, timeout=60) == [["tolist"]] * 4
    assert ranks.run(4, questions_of_ranks, name, 6, timeout=60) == [[]] * 4


@pytest.mark.parametrize(
    ("ep", "etp", "top_k", "wanted", "chosen"),
    [
        (1, 1, 2, "auto", "local"),
        (2, 1, 2, "auto", "all_to_all"),
        (2, 1, 3, "auto", "all_gather"),
        (1, 2, 2, "auto", "all_to_all"),
        (2, 1, 3, "all_to_all", "all_to_all"),
        (4, 2, 1, "all_gather", "all_gather"),
    ],
)
def test_the_way_that_moves_less_is_taken(ep: int, etp: int, top_k: int, wanted: str, chosen: str) -> None:
    assert dispatcher_for(MoeConfig(top_k=top_k, dispatcher=wanted), ep, etp)[0] == chosen
    # A token's rows differ where its gates multiply them, so that it cannot travel once for all of its experts.
    by_input = dispatcher_for(MoeConfig(top_k=top_k, dispatcher=wanted, gate_on="input"), ep, etp)[0]
    assert by_input == ("all_to_all" if (wanted, chosen) == ("auto", "all_gather") else chosen)
