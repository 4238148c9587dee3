"""Rules of layouts: their suggestions, and that they accept exactly the layouts that divide evenly."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.rules import violations
from tests.conf.test_rules import (
    FURTHER,
    SPARSE,
    assert_violation_has_a_suggestion_that_works,
    error_message,
    parsed,
    suggestions,
    view,
)

PARTS = {"parallel.ep": 2, "model.moe.overlap_degree": 2, **SPARSE}


def test_layouts_are_suggested_if_no_single_setting_helps():
    changes = {"parallel.tp": 16, "parallel.pp": 12, "parallel.ep": 100, "parallel.vpp": 3, "model.num_layers": 48}
    changes |= {"model.num_attention_heads": 32, "model.hidden_size": 4096, "model.moe.num_experts": 128}
    broken = view(changes | {"train.global_batch_size": 16384, "train.micro_batch_size": 1}, 16384)
    message = error_message(broken).splitlines()[-1]
    assert message.startswith("  nearest layouts of 16384 ranks: ")
    layouts = message.partition(": ")[2].split(", or ")
    assert len(layouts) == 2
    for layout in layouts:
        fixed = broken
        for override in layout.split():
            key, _, value = override.partition("=")
            fixed = fixed.replace(key, parsed(value))
        assert error_message(fixed) == ""
    # By hand: 12 stages become 16 rather than 8, which is further in doublings, and ep=100 becomes 128;
    # tensor parallelism and the chunks per stage can stay.
    assert layouts[0] == "parallel.pp=16 parallel.ep=128"


def test_no_layouts_are_suggested_if_one_setting_helps():
    assert "nearest layouts" not in error_message(view({"parallel.vpp": 2}, 4))
    assert "nearest layouts" in error_message(view({"parallel.tp": 2, "parallel.pp": 3}, 8))


def divides_evenly(amount: int, *sides: int) -> bool:
    """Whether numpy can reshape `amount` elements to a grid with these sides."""
    try:
        np.arange(amount).reshape(-1, *sides)
    except ValueError:
        return False
    return True


def test_layouts_are_accepted_if_everything_divides_evenly():
    """Every small layout is accepted exactly if ranks, heads, layers, experts and tokens divide evenly."""
    accepted = 0
    for world, tp, pp, cp, ep, etp in itertools.product((1, 2, 4, 6, 8), (1, 2, 3), (1, 2), (1, 2), (1, 2, 3), (1, 2)):
        sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp}
        changes = {f"parallel.{key}": size for key, size in sizes.items()}
        changes |= SPARSE | {"train.micro_batch_size": 1, "train.global_batch_size": 24}
        possible = (
            divides_evenly(world, pp, cp, tp)
            and divides_evenly(world, pp, ep, etp)
            and divides_evenly(24, world // (tp * pp * cp))
            and all(divides_evenly(amount, tp) for amount in (4, 512, 4096))
            and divides_evenly(8, ep)
            and divides_evenly(512, etp)
            and divides_evenly(4, pp)
            and divides_evenly(256, cp, tp)
        )
        assert (violations(view(changes, world)) == []) == possible, (world, sizes)
        accepted += possible
    assert accepted > 20


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 40),
    degrees=st.tuples(*[st.integers(1, 6)] * 5),
    heads=st.integers(1, 12),
    experts=st.integers(0, 12),
    batch=st.integers(1, 100),
)
def test_every_suggestion_satisfies_its_rule_and_violates_no_other(world, degrees, heads, experts, batch):
    changes = dict(zip((f"parallel.{key}" for key in ("tp", "pp", "cp", "ep", "etp")), degrees, strict=True))
    changes |= {"model.num_attention_heads": heads, "model.moe.num_experts": experts, "train.global_batch_size": batch}
    broken = view(changes, world)
    rules = {violation.rule for violation in violations(broken)}
    for line in error_message(broken).splitlines():
        rule = line.strip().split(", but ")[0]
        for key, value in suggestions(line):
            left = {violation.rule for violation in violations(broken.replace(key, value))}
            assert rule not in left
            assert line.endswith(FURTHER) or left < rules


@pytest.mark.parametrize(
    ("changes", "numbers", "suggestion"),
    [
        (PARTS | {"parallel.ep": 1}, "overlap_degree needs parallel.ep > 1", "model.moe.overlap_degree=1"),
        (PARTS | {"model.moe.overlap_degree": 3}, "8 % 6 = 2", "model.moe.overlap_degree=2"),
        (PARTS | {"model.moe.overlap_degree": 0}, "overlap_degree >= 1", "model.moe.overlap_degree=1"),
        (PARTS | {"model.moe.dispatcher": "all_gather"}, "it is all_gather", "model.moe.dispatcher=auto"),
        (PARTS | {"model.moe.dispatcher": "deep_ep"}, "it is deep_ep", "model.moe.dispatcher=auto"),
    ],
)
def test_rows_travel_in_parts_only_where_they_can(changes: dict[str, object], numbers: str, suggestion: str) -> None:
    assert error_message(view(PARTS, 2)) == ""
    assert_violation_has_a_suggestion_that_works(changes, 2, numbers, suggestion)
