"""Rules of layouts: what they advise, and that they hold for what can be dealt out."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.rules import violations
from tests.conf.test_rules import FURTHER, SPARSE, advice, complaint, parsed, view


def test_where_no_single_setting_helps_whole_layouts_are_named():
    changes = {"parallel.tp": 16, "parallel.pp": 12, "parallel.ep": 100, "parallel.vpp": 3, "model.num_layers": 48}
    changes |= {"model.num_attention_heads": 32, "model.hidden_size": 4096, "model.moe.num_experts": 128}
    broken = view(changes | {"train.global_batch_size": 16384, "train.micro_batch_size": 1}, 16384)
    told = complaint(broken).splitlines()[-1]
    assert told.startswith("  nearest layouts of 16384 ranks: ")
    layouts = told.partition(": ")[2].split(", or ")
    assert len(layouts) == 2
    for layout in layouts:
        mended = broken
        for override in layout.split():
            key, _, value = override.partition("=")
            mended = mended.replace(key, parsed(value))
        assert complaint(mended) == ""
    # Drawn by hand: 12 stages become 16 (a third up) rather than 8 (a third down is further in doublings), 100 experts'
    # ranks 128; tensor parallelism and the chunks of a stage may stay.
    assert layouts[0] == "parallel.pp=16 parallel.ep=128"


def test_one_setting_that_helps_is_advice_enough():
    assert "nearest layouts" not in complaint(view({"parallel.vpp": 2}, 4))
    assert "nearest layouts" in complaint(view({"parallel.tp": 2, "parallel.pp": 3}, 8))


def can_deal(amount: int, *hands: int) -> bool:
    """Whether numpy can lay `amount` things out as a grid with these sides."""
    try:
        np.arange(amount).reshape(-1, *hands)
    except ValueError:
        return False
    return True


def test_layouts_against_dealing_things_out():
    """Every small layout: accepted exactly where ranks, heads, layers, experts and tokens can be dealt out evenly."""
    accepted = 0
    for world, tp, pp, cp, ep, etp in itertools.product((1, 2, 4, 6, 8), (1, 2, 3), (1, 2), (1, 2), (1, 2, 3), (1, 2)):
        sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp}
        changes = {f"parallel.{key}": size for key, size in sizes.items()}
        changes |= SPARSE | {"train.micro_batch_size": 1, "train.global_batch_size": 24}
        possible = (
            can_deal(world, pp, cp, tp)
            and can_deal(world, pp, ep, etp)
            and can_deal(24, world // (tp * pp * cp))
            and all(can_deal(amount, tp) for amount in (4, 512, 4096))
            and can_deal(8, ep)
            and can_deal(512, etp)
            and can_deal(4, pp)
            and can_deal(256, cp, tp)
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
def test_every_advice_mends_its_rule_and_breaks_no_other(world, degrees, heads, experts, batch):
    changes = dict(zip((f"parallel.{key}" for key in ("tp", "pp", "cp", "ep", "etp")), degrees, strict=True))
    changes |= {"model.num_attention_heads": heads, "model.moe.num_experts": experts, "train.global_batch_size": batch}
    broken = view(changes, world)
    rules = {violation.rule for violation in violations(broken)}
    for line in complaint(broken).splitlines():
        rule = line.strip().split(", but ")[0]
        for key, value in advice(line):
            left = {violation.rule for violation in violations(broken.replace(key, value))}
            assert rule not in left
            assert line.endswith(FURTHER) or left < rules
