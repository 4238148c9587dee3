import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conf import rules
from conf.schema import SCHEDULES, Config, OptimConfig, TrainConfig
from training.lr_schedule import learning_rate, schedule_jump

OPTIM = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, decay_fraction=0.5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 12 steps, 4 of them warm-up, by hand. Cosine: 0.2 + 0.8 (1 + cos(pi k/8))/2 at k = 4 and 6.
        ("cosine", {1: 0.25, 2: 0.5, 4: 1.0, 8: 0.6, 10: 0.2 + 0.4 * (1 - math.sqrt(0.5)), 12: 0.2}),
        ("linear", {1: 0.25, 4: 1.0, 6: 0.8, 8: 0.6, 10: 0.4, 12: 0.2}),
        # The last half: the decay starts after step 6.
        ("wsd", {2: 0.5, 4: 1.0, 5: 1.0, 6: 1.0, 9: 0.6, 12: 0.2}),
        ("constant", {2: 0.5, 4: 1.0, 5: 1.0, 12: 1.0}),
    ],
)
def test_hand_computed_values(schedule: str, expected: dict[int, float]) -> None:
    optim = dataclasses.replace(OPTIM, schedule=schedule)
    assert {step: learning_rate(step, optim, 12) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_a_decay_longer_than_what_the_warmup_leaves_starts_after_the_warmup() -> None:
    optim = dataclasses.replace(OPTIM, schedule="wsd", warmup_steps=8, decay_fraction=0.9)
    assert [learning_rate(step, optim, 12) for step in (8, 10, 12)] == pytest.approx([1.0, 0.6, 0.2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_may_exceed_the_steps(schedule: str) -> None:
    optim = dataclasses.replace(OPTIM, schedule=schedule, warmup_steps=100)
    assert [learning_rate(step, optim, 3) for step in (1, 2, 3)] == pytest.approx([0.01, 0.02, 0.03])


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    low=st.floats(0, 1),
    decay=st.floats(0.05, 1),
)
def test_shape(schedule: str, steps: int, warmup: int, low: float, decay: float) -> None:
    optim = OptimConfig(lr=1.0, min_lr=low, warmup_steps=warmup, schedule=schedule, decay_fraction=decay)
    rates = [learning_rate(step, optim, steps) for step in range(1, steps + 1)]
    rising, falling = rates[:warmup], rates[max(warmup - 1, 0) :]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b for a, b in pairwise(falling))
    assert all(0 < rate <= 1 for rate in rising) and all(low - 1e-12 <= rate <= 1 for rate in falling)
    if warmup < steps:
        assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else low)
        # No jump: cosine, the steepest, falls by at most pi/2 times its mean slope.
        shortest = min(decay * steps, steps - warmup) if schedule == "wsd" else steps - warmup
        largest = max(a - b for a, b in pairwise([1.0, *falling]))
        assert largest <= math.pi / 2 * (1 - low) / shortest + 1e-12


def test_unknown_schedule_is_the_users_error() -> None:
    with pytest.raises(ValueError, match=r"optim\.schedule=cosin .* cosine, linear"):
        learning_rate(1, dataclasses.replace(OPTIM, schedule="cosin"), 10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_finished_schedule_that_is_extended_is_warned_of(schedule: str) -> None:
    optim = dataclasses.replace(OPTIM, schedule=schedule, decay_fraction=0.5 if schedule == "wsd" else 0.2)
    last = learning_rate(12, optim, 12)
    longer = Config(optim=optim, train=TrainConfig(steps=24))
    told = schedule_jump(last, 12, longer)
    if schedule == "constant":
        assert told is None
        return
    assert told is not None and "from 0.2 at step 12 to " in told
    assert f"{learning_rate(13, optim, 24):.3g} at step 13" in told and "optim.schedule=constant optim.lr=0.2" in told
    # What it proposes is taken and goes on at the last rate; a run that goes on as it began is not warned of.
    proposed = OmegaConf.from_dotlist(told.split("at the last rate: ")[1].split())
    flat = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(longer), proposed))
    assert not rules.reset_unused(flat, 1)[1]
    assert schedule_jump(last, 12, flat) is None
    assert schedule_jump(learning_rate(12, optim, 24), 12, longer) is None
    assert schedule_jump(None, 12, longer) is None and schedule_jump(0.9, 24, longer) is None
