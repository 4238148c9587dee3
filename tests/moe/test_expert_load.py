"""Drawn by hand: two layers of four experts."""

import numpy as np
import pytest

from moe.expert_load import ExpertLoad
from moe.router_metrics import ROUTER_METRICS


def load_of(load_LE: list[list[float]]) -> ExpertLoad:
    return ExpertLoad(
        [1, 3],
        np.array(load_LE),
        {
            "dropped_fraction": np.array([0.1, 0.3]),
            "unserved_fraction": np.array([0.05, 0.25]),
            "router_entropy": np.array([1.2, 0.8]),
            "router_logit_rms": np.array([3.0, 2.0]),
            "aux_loss": np.array([1.0, 2.5]),
            "z_loss": np.array([4.0, 6]),
        },
    )


def test_row_gives_means_and_the_worst_layer() -> None:
    row = load_of([[20, 10, 10, 0], [0, 30, 10, 0]]).as_row()
    assert row == pytest.approx(
        {
            "aux_loss": 1.75,
            "z_loss": 5.0,
            "dropped_fraction": 0.2,
            "unserved_fraction": 0.15,
            "load_max_over_mean": 3.0,  # 30 of 40 where 10 would be even
            "load_cv": 1.5**0.5,  # loads 10 above and 20, 0 and 10 below their mean of 10: sqrt(600 / 4) / 10
            "router_entropy": 1.0,
            "router_logit_rms": 3.0,
            "dead_experts": 2,  # the other layer has one
        }
    )
    assert tuple(row) == tuple(ROUTER_METRICS)


def test_shares_of_a_layer_without_choices_are_zero() -> None:
    load = load_of([[0, 0, 0, 0], [1, 3, 0, 0]])
    assert load.share_LE.tolist() == [[0, 0, 0, 0], [0.25, 0.75, 0, 0]]
    assert load.metric("load_max_over_mean").tolist() == [0, 3]
    assert load.metric("load_cv").tolist() == [
        0,
        pytest.approx(1.5**0.5),
    ]  # 1, 3, 0, 0 around 1: sqrt((0 + 4 + 1 + 1) / 4)
