"""The learning rate as a function of the step. Nothing is kept between steps, so a continued run needs no state."""

import math

from conf.schema import SCHEDULES, Config, OptimConfig


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """The learning rate of update number `step`, counted from 1 to `steps`.

    The warm-up is linear from 0 and reaches `optim.lr` at `warmup_steps`; `optim.schedule` then decides:

    - cosine: half a cosine wave from lr to min_lr (SGDR, arXiv:1608.03983, eq. 5, without restarts);
    - linear: a straight line from lr to min_lr;
    - wsd: lr, then a straight line to min_lr over the last `decay_fraction` of the steps (warm-up, stable, decay;
      MiniCPM, arXiv:2404.06395, section 4), or over what the warm-up leaves where that is less;
    - constant: lr.

    All but constant end at min_lr (unset: lr / 10) when `step == steps`. A warm-up of `steps` or more is all there is
    of the schedule. Raises ValueError for an unknown schedule.
    """
    assert 1 <= step <= steps, f"step {step} is outside 1 to {steps}"
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule} does not exist: choose one of {', '.join(SCHEDULES)}")
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps

    decay_start = optim.warmup_steps
    if optim.schedule == "constant":
        decay_start = steps
    elif optim.schedule == "wsd":
        decay_start = max(decay_start, steps - optim.decay_fraction * steps)
    if step <= decay_start:
        return optim.lr

    done = (step - decay_start) / (steps - decay_start)  # 0 where the decay starts, 1 at the last step
    left = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    low = optim.lr / 10 if optim.min_lr is None else optim.min_lr
    return low + (optim.lr - low) * left


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
    unread = f" optim.decay_fraction={OptimConfig().decay_fraction}" if optim.schedule == "wsd" else ""
    return (
        f"the learning rate jumps from {last:.3g} at step {step} to {following:.3g} at step {step + 1}: "
        f"optim.schedule={optim.schedule} over train.steps={steps} is not the schedule of the earlier steps. To go on "
        f"at the last rate: optim.schedule=constant optim.lr={last:.6g} optim.warmup_steps=0 optim.min_lr=null{unread}"
    )
