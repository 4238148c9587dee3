"""The learning rate as a function of the step. Nothing is kept between steps, so a continued run needs no state."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from conf.registry import Registry
from conf.schema import Config, OptimConfig


@dataclass(frozen=True)
class Schedule:
    """A value of optim.schedule."""

    name: str
    rate: Callable[[int, OptimConfig, int], float]
    """(step, optim, steps) -> the learning rate of update number `step` of `steps`, after the warm-up. optim.min_lr is
    None unless it is set; `between` has its default."""
    reads: tuple[str, ...] = ("min_lr",)
    """Which of optim.min_lr and optim.decay_fraction it uses: one that nothing reads is refused."""


def _check(schedule: Schedule) -> None:
    if unknown := set(schedule.reads) - {"min_lr", "decay_fraction"}:
        names = ", ".join(sorted(unknown))
        raise ValueError(
            f"learning-rate schedule {schedule.name}: reads names {names}; it takes min_lr and decay_fraction"
        )


def between(optim: OptimConfig, left: float) -> float:
    """From the end of the schedule, min_lr (unset: lr / 10), at `left` = 0 to its peak, lr, at 1."""
    low = optim.lr / 10 if optim.min_lr is None else optim.min_lr
    return low + (optim.lr - low) * left


def _left(step: int, start: float, steps: int) -> float:
    """1 at step `start`, 0 at the last one."""
    return 1 - (step - start) / (steps - start)


def _cosine(step: int, optim: OptimConfig, steps: int) -> float:
    """Half a cosine wave from lr to min_lr (SGDR, arXiv:1608.03983, eq. 5, without restarts)."""
    done = (step - optim.warmup_steps) / (steps - optim.warmup_steps)
    return between(optim, (1 + math.cos(math.pi * done)) / 2)


def _linear(step: int, optim: OptimConfig, steps: int) -> float:
    """A straight line from lr to min_lr."""
    return between(optim, _left(step, optim.warmup_steps, steps))


def _wsd(step: int, optim: OptimConfig, steps: int) -> float:
    """lr, then a straight line to min_lr over the last `decay_fraction` of the steps (warm-up, stable, decay; MiniCPM,
    arXiv:2404.06395, section 4), or over what the warm-up leaves where that is less."""
    start = max(optim.warmup_steps, steps - optim.decay_fraction * steps)
    return optim.lr if step <= start else between(optim, _left(step, start, steps))


SCHEDULES = Registry(
    "learning-rate schedule",
    Schedule("cosine", _cosine),
    Schedule("linear", _linear),
    Schedule("wsd", _wsd, reads=("min_lr", "decay_fraction")),
    Schedule("constant", lambda step, optim, steps: optim.lr, reads=()),
    check=_check,
)


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """The learning rate of update number `step`, counted from 1 to `steps`.

    The warm-up is linear from 0 and reaches `optim.lr` at `warmup_steps`; `optim.schedule` then decides. A warm-up of
    `steps` or more is all there is of the schedule. Raises ValueError for an unknown schedule.
    """
    assert 1 <= step <= steps, f"step {step} is outside 1 to {steps}"
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule} does not exist: choose one of {', '.join(SCHEDULES)}")
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    return SCHEDULES[optim.schedule].rate(step, optim, steps)


def schedule_jump(last: float | None, step: int, config: Config) -> str | None:
    """What to warn of where a continued run's schedule does not go through the rate that step `step` had, as when
    `train.steps` of a finished cosine, linear or wsd run is raised. None: it does, or there are no more steps.

    Args:
        last: the learning rate of step `step`; None: not known.
    """
    optim, steps = config.optim, config.train.steps
    if last is None or step >= steps or math.isclose(learning_rate(step, optim, steps), last, rel_tol=1e-3):
        return None
    following = learning_rate(step + 1, optim, steps)
    # Settings that schedule=constant does not read have to be at their defaults.
    reads_fraction = "decay_fraction" in SCHEDULES[optim.schedule].reads
    unread = f" optim.decay_fraction={OptimConfig().decay_fraction}" if reads_fraction else ""
    return (
        f"the learning rate jumps from {last:.3g} at step {step} to {following:.3g} at step {step + 1}: "
        f"optim.schedule={optim.schedule} over train.steps={steps} is not the schedule of the earlier steps. To go on "
        f"at the last rate: optim.schedule=constant optim.lr={last:.6g} optim.warmup_steps=0 optim.min_lr=null{unread}"
    )
