"""What failures cost a run, and how often it should write checkpoints. Does not import torch.

Legend: M mean time between failures of the whole job, R time from a failure to the first step again, D time that a
checkpoint stops training, T training between two checkpoints; in seconds.
"""

import math
from dataclasses import dataclass

from conf.commands import PlanOptions
from conf.schema import Config
from parallel.layout import Layout
from training.adapters import adapter_parameters
from training.memory_estimate import optimizer_bytes, stage_parameters, stages_of
from training.planner.step import HOST_LINK

DAY, HOUR, MINUTE = 86400.0, 3600.0, 60.0


@dataclass(frozen=True)
class Failures:
    """Failures of a job, at a constant rate."""

    mtbf: float
    """M."""
    restart: float
    """R."""
    checkpoint: float
    """D."""

    def young(self) -> float:
        """The best T to first order: sqrt(2 D M) (Young 1974, A first order approximation to the optimum checkpoint
        interval, Communications of the ACM 17 (9), 530)."""
        return math.sqrt(2 * self.checkpoint * self.mtbf)

    def daly(self) -> float:
        """The best T: sqrt(2 D M) (1 + sqrt(D / 2M) / 3 + (D / 2M) / 9) - D for D < 2M, otherwise M (Daly 2006, A
        higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems
        22 (3), 303)."""
        ratio = self.checkpoint / (2 * self.mtbf)
        if ratio >= 1:
            return self.mtbf
        return self.young() * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.checkpoint

    def lost(self, interval: float) -> float:
        """Share of the time that is not spent on steps that count. The expected time of T of training, with failures in
        checkpoints and restarts too, is M exp(R / M) (exp((T + D) / M) - 1) (Daly 2006).

        Args:
            interval: T.
        """
        exponent = (interval + self.checkpoint) / self.mtbf
        if exponent > 500:  # would overflow: training does not get as far as its next checkpoint
            return 1.0
        return 1 - interval / (self.mtbf * math.exp(self.restart / self.mtbf) * math.expm1(exponent))


@dataclass(frozen=True)
class Advice:
    """How often a run should write checkpoints."""

    failures: Failures
    size: float
    """Bytes of a checkpoint."""
    load: float
    """Seconds to read it."""
    every: int
    """checkpoint.every, in steps."""
    interval: float
    """Seconds of training between two."""

    @property
    def lost(self) -> float:
        return self.failures.lost(self.interval)


def advise(config: Config, layout: Layout, step_seconds: float, options: PlanOptions) -> Advice | None:
    """The advice for a run whose steps take this long; None: the bandwidth of the storage is unknown.

    With checkpoint.asynchronous training stops only while tensors are copied to host memory, but what is lost with a
    failure is older by the time of writing, which counts as part of the restart.
    """
    per_node = config.cluster.storage_gb_per_s
    if per_node is None:
        return None
    nodes = -(-layout.world // config.cluster.ranks_per_node)
    size = checkpoint_bytes(config)
    transfer = size / (nodes * per_node * 1e9)
    restart, stopped = options.restart_minutes * MINUTE + transfer, transfer
    if config.checkpoint.asynchronous:
        restart, stopped = restart + transfer, size / (layout.world * HOST_LINK)
    failures = Failures(options.gpu_mtbf_hours * HOUR / layout.world, restart, stopped)
    every = max(1, round(failures.daly() / step_seconds))
    return Advice(failures, size, transfer, every, every * step_seconds)


def checkpoint_bytes(config: Config) -> float:
    """Bytes of a checkpoint: fp32 weights and the optimizer's states, without base weights under adapters."""
    alone = Layout(1)
    (stage,) = stages_of(config.model, alone)
    weights = sum(stage_parameters(config.model, alone, stage))
    if config.lora.rank is not None:
        weights = sum(adapter_parameters(config, alone))
    return 4 * weights + optimizer_bytes(config, alone, stage, bf16=False)


def describe(advice: Advice, gpus: int, options: PlanOptions) -> str:
    """Two lines for launch.plan."""
    f, size = advice.failures, advice.size / 1e9
    read = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
    return (
        f"failures one in {_duration(f.mtbf)} ({gpus:,} GPUs, one in {options.gpu_mtbf_hours:,.0f} hours each); "
        f"{_duration(f.restart)} to continue (plan.restart_minutes={options.restart_minutes:g}, and to read "
        f"{read} GB)\n"
        f"advice   checkpoint.every={advice.every} ({_duration(advice.interval)}; each stops training for "
        f"{_duration(f.checkpoint)}): {advice.lost:.2%} of the time is lost, {_duration(advice.lost * DAY)} a day"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
