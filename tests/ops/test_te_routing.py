"""Router and permutation of tokens by TransformerEngine, with the stand-in for the package."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from conf.schema import MoeConfig
from moe.router import ROUTE
from ops import te
from ops.operation import Operation, Row
from ops.permute import PERMUTATION, TORCH_PERMUTATION
from ops.te_permute import TePermutation
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_context, selected, tiny, try_on
from tests.stand_ins import installed
from tests.stand_ins.signatures import table
from tests.stand_ins.versions import as_version, find

CUDA = torch.device("cuda")
GROUPS = {"num_experts": 16, "num_expert_groups": 4, "top_k_groups": 2, "top_k": 4}
SIGMOID = {"score_function": "sigmoid", "bias_update_rate": 0.01}


@pytest.fixture(autouse=True)
def transformer_engine() -> Iterator[None]:
    with installed("transformer_engine"):
        yield


@pytest.fixture
def chosen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Row]:
    """The row of an operation with TransformerEngine's implementation and the reference alone, of a run in bf16 on a
    CPU that pretends to be a GPU."""

    def chosen(operation: Operation[Any], recompute: list[str] | None = None, **moe: Any) -> Row:
        model = tiny(MoeConfig(**{"num_experts": 8, "top_k": 2, **moe}), hidden_size=16, recompute=recompute or [])
        with monkeypatch.context() as patch:
            patch.setattr(operation, "implementations", [i for i in operation.implementations if i.name == te.NAME])
            try_on(runtime.device, operation, patch)
            return selected(operation, run_context(model, runtime, torch.bfloat16, CUDA))[1]

    return chosen


ROUTERS: dict[str, dict[str, Any]] = {
    "one": {"top_k": 1},
    "softmax": {"renormalize": False, "routed_scaling_factor": 2.5},
    "softmax over their sum": {},
    "softmax after": {"softmax_order": "after"},
    "sigmoid": SIGMOID,
    "sigmoid of one": {"score_function": "sigmoid", "top_k": 1},
    "groups by their two best": GROUPS | SIGMOID,
    "groups by their best": GROUPS | {"top_k_groups": 3, "top_k": 3, "group_score": "max", "renormalize": False},
}


@pytest.mark.parametrize("version", table()["transformer_engine"])
@pytest.mark.parametrize("moe", ROUTERS.values(), ids=ROUTERS)
def test_a_router_that_chooses_the_same_is_used(chosen: Callable[..., Row], moe: dict[str, Any], version: str) -> None:
    """Experts, gates, losses and the gradient of the logits."""
    with as_version("transformer_engine", version) as called:
        row = chosen(ROUTE, **moe)
    assert row.name == te.NAME and not row.refused, row
    assert called == {"transformer_engine.pytorch.router.fused_topk_with_score_function"}


LEFT_ALONE: list[tuple[dict[str, Any], str]] = [
    ({"recompute": ["moe"]}, "chooses anew where a layer is recomputed"),
    ({"bias_update_rate": 0.01}, "takes a bias for sigmoid scores alone"),
    (SIGMOID | {"renormalize": False}, "divides sigmoid gates by their sum"),
    (GROUPS | SIGMOID | {"top_k": 2}, "not by 2"),
    (GROUPS, "scores groups by logits"),
    ({"load_balancing": "sinkhorn"}, "sinkhorn chooses over the whole micro-batch"),
]


@pytest.mark.parametrize(("settings", "reason"), LEFT_ALONE, ids=[reason for _, reason in LEFT_ALONE])
def test_a_rule_that_it_has_not_is_left_to_the_reference(
    chosen: Callable[..., Row], settings: dict[str, Any], reason: str
) -> None:
    row = chosen(ROUTE, **settings)
    assert row.name == "torch" and f"{te.NAME} " in row.why and reason in row.why


WRONG = [(ROUTE, "router.fused_topk_with_score_function"), (PERMUTATION, "moe_permute"), (PERMUTATION, "moe_unpermute")]


@pytest.mark.parametrize(("operation", "name"), WRONG, ids=lambda x: getattr(x, "field", x))
def test_what_differs_is_left_out(
    chosen: Callable[..., Row], monkeypatch: pytest.MonkeyPatch, operation: Operation[Any], name: str
) -> None:
    owner, attribute = find(f"transformer_engine.pytorch.{name}")
    right = getattr(owner, attribute)

    def wrong(*args: Any, **how: Any) -> Any:
        found = right(*args, **how)
        return (found[0] * 1.05, *found[1:]) if isinstance(found, tuple) else found * 1.05

    monkeypatch.setattr(owner, attribute, wrong)
    row = chosen(operation)
    assert row.name == "torch" and f"{te.NAME} differs from torch's" in row.why and row.refused


@pytest.mark.parametrize("version", table()["transformer_engine"])
def test_a_permutation_that_computes_the_same_is_used(chosen: Callable[..., Row], version: str) -> None:
    with as_version("transformer_engine", version) as called:
        assert chosen(PERMUTATION).name == te.NAME
    assert called == {f"transformer_engine.pytorch.moe_{name}" for name in ("permute", "unpermute")}
    assert "has no rows of padding" in chosen(PERMUTATION, pad_to_capacity=True).why


def test_no_choice_is_kept() -> None:
    """As on a rank whose experts nobody chose."""
    none, mine = torch.empty(0, dtype=torch.int64), TePermutation()
    assert mine.permute(random(3, 8), none, 2, False).shape == (0, 8)
    for sums in (
        mine.unpermute(random(0, 8), none, random(3, 2), False),
        mine.permute_backward(random(0, 8), none, 2, 3),
    ):
        assert torch.equal(sums, torch.zeros(3, 8))
    gates_TK, rows_RD, choice_R = random(3, 2, seed=1), random(2, 8), torch.tensor([5, 0])
    got = mine.unpermute(rows_RD, choice_R, gates_TK, False)
    torch.testing.assert_close(got, TORCH_PERMUTATION.unpermute(rows_RD, choice_R, gates_TK, False))
