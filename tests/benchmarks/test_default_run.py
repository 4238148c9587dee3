"""What the ablation of the default run says of a run, from rows drawn by hand, and that its variants can be run."""

import pytest

from benchmarks.default_run import VARIANTS, figures, show, steps_of_equal_seconds
from benchmarks.published import composed
from conf import rules


def row(step: int, dropped: float, load: float, dead: int = 0) -> dict[str, float]:
    shares = {"dropped_fraction": dropped, "load_max_over_mean": load, "dead_experts": dead}
    return {"step": step, "loss": 4.0, "step_seconds": float(step), **shares}


def test_the_first_steps_do_not_count_for_the_balance_but_for_dead_experts() -> None:
    rows = [row(20, 0.9, 7.0, dead=3), row(21, 0.1, 2.0), row(22, 0.05, 2.5)]
    rows += [{"step": 21, "val_bits_per_byte": 2.0}, {"step": 22, "val_bits_per_byte": 1.75}]
    found = figures(rows)
    assert found["bits/byte"] == 1.75 and found["s/step"] == 21.0
    assert found["max. dropped"] == 0.1 and found["max. load"] == 2.5
    assert found["steps above 2"] == 1 and found["max. dead"] == 3


def test_a_dense_run_has_no_balance() -> None:
    dense = {"step": 30, "loss": 4.0, "step_seconds": 1.0, "dropped_fraction": None, "load_max_over_mean": None}
    found = figures([{**dense, "dead_experts": None}, {"step": 30, "val_bits_per_byte": 1.8}])
    assert found["max. load"] == found["max. dropped"] == found["max. dead"] == 0


def test_the_table_has_means_and_of_maxima_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [figures([row(21, 0.1, load), {"step": 21, "val_bits_per_byte": bits}]) for load, bits in ((1, 1.5), (3, 2))]
    show({"as shipped": runs})
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[2:] == ["1.750", "1.000", "21.000", "0.100", "3.000", "0.500", "0.000", "0.500"]


def test_the_dense_model_also_trains_for_as_many_seconds() -> None:
    """Each ratio is of neighbours in time: that the machine was three times as slow for one pair changes nothing, and
    a slow run alone counts for nothing."""
    assert steps_of_equal_seconds(100, [(3.0, 2.0), (9.0, 6.0), (9.0, 2.0), (2.9, 2.0), (3.0, 2.1)]) == 150


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_can_be_run(variant: str) -> None:
    rules.check(composed(VARIANTS[variant]), 1)
