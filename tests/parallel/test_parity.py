"""Every layout is the same model: losses, gradients, routing decisions and drops equal those of one rank. The cells are
those of `python -m benchmarks.parity`, which runs all of them."""

import dataclasses

import numpy as np
import pytest

from benchmarks import parity
from benchmarks.parity import LIMIT, MATRIX, VARIANTS, Outcome, agreement, deviations, relative

TESTED = [layouts for layouts in MATRIX if layouts.tested]


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Outcome]:
    return parity.one_rank(ranks, VARIANTS)


@pytest.mark.parametrize("layouts", TESTED, ids=lambda layouts: f"{layouts.name}, {layouts.tested}")
def test_a_layout_is_the_same_model(ranks, one_rank, layouts):
    for name, every in parity.cells(ranks, layouts, layouts.tested.split()):
        told = deviations(every[0], one_rank[name])
        assert max(told.values()) <= LIMIT, (name, {what: value for what, value in told.items() if value > LIMIT})
        assert agreement(every) == 0


def test_the_matrix_is_large_and_its_tested_part_has_every_variant():
    assert sum(len(layouts.variants) for layouts in MATRIX) >= 64 and len(TESTED) >= 16
    assert {name for layouts in TESTED for name in layouts.tested.split()} == set(VARIANTS) - {"six_layers"}
    assert all(set(layouts.tested.split()) <= set(layouts.variants) for layouts in MATRIX)
    assert len({layouts.name for layouts in MATRIX}) == len(MATRIX)


def test_the_comparison_can_fail(ranks, one_rank):
    assert parity.control(ranks, one_rank["drops"]) > 1e-3
    got = one_rank["drops"]
    lost = got.dropped_SL.copy()
    lost[0, 0] += 1 / 256
    worse = {
        "drops": dataclasses.replace(got, dropped_SL=lost),
        "loss": dataclasses.replace(got, losses=[*got.losses[:2], got.losses[2] * (1 + 2e-5)]),
        "gradient of final_norm.weight": dataclasses.replace(
            got, gradients=got.gradients | {"final_norm.weight": got.gradients["final_norm.weight"] * (1 + 2e-5)}
        ),
    }
    for what, other in worse.items():
        assert [key for key, value in deviations(other, got).items() if value > LIMIT] == [what]
    assert agreement([got, worse["loss"]]) > 0


def test_the_variants_do_what_their_names_say(one_rank):
    choices = 32 * 4  # a layer's tokens of a step
    for name, (drops, layers, top_k) in {
        "drops": (True, 4, 2),
        "deepseek": (True, 4, 2),
        "dropless": (False, 2, 2),
        "switch": (True, 4, 1),
        "switch_documents": (True, 2, 1),
        "expert_choice": (False, 4, 1.5),
        "sinkhorn": (True, 4, 2),
        "global": (True, 2, 2),
        "global_bias": (True, 2, 2),
        "six_layers": (True, 6, 2),
    }.items():
        outcome = one_rank[name]
        assert (outcome.dropped_SL > 0).all() if drops else (outcome.dropped_SL == 0).all()
        assert outcome.load_SLE.sum(-1).tolist() == [[choices * top_k] * layers] * 3
    assert one_rank["dense"].load_SLE.size == 0


def test_the_gradient_norm_counts_every_element_once(one_rank):
    for outcome in one_rank.values():
        squares = sum(np.square(g.astype(np.float64)).sum() for g in outcome.gradients.values())
        assert relative(outcome.norms[0], np.sqrt(squares)) < 1e-6
        assert all(np.abs(g).max() > 0 for g in outcome.gradients.values())


@pytest.mark.parametrize(("far", "seen", "code"), [(9e-6, 1e-2, 0), (1.1e-5, 1e-2, 1), (0.0, 1e-4, 1)])
def test_the_command_fails_when_a_cell_deviates_or_the_control_does_not(one_rank, monkeypatch, capsys, far, seen, code):
    def cells(pool, layouts, names):
        for name in names:
            got = one_rank[name]
            yield name, [dataclasses.replace(got, losses=[loss * (1 + far) for loss in got.losses])] * 2

    monkeypatch.setattr(parity, "one_rank", lambda pool, variants: one_rank)
    monkeypatch.setattr(parity, "cells", cells)
    monkeypatch.setattr(parity, "control", lambda pool, wanted: seen)
    assert parity.main(["-k", "dp2"]) == code
    printed = capsys.readouterr().out
    assert printed.count("DEVIATES loss") == (len(printed.splitlines()) - 3 if far > LIMIT else 0)
    assert ("not sensitive" in printed) == (seen < 1e-3)
