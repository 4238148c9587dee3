"""`python -m launch.plan model=NAME cluster=NAME nodes=N [overrides]`: the fastest layouts of a model that fit into the
memory of a cluster's GPUs, with predicted memory and step time by part. Imports no PyTorch.

Settings that are given stay as they are: with parallel.* only that layout is evaluated."""

import math
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from conf import rules
from conf.commands import PlanConfig, PlanOptions
from conf.config_view import ConfigView
from conf.schema import Config
from launch.cli import command
from training.planner import failures, report, scaling_laws
from training.planner.rates import Rates, rates_of
from training.planner.search import Found, Options, Plan, search
from training.slurm import Shape, sbatch_command

SEARCHED = ("train.micro_batch_size", "model.recompute", "optim.cpu_offload")
OWN = ("ranks", "nodes", "goal", "format", "plot", "budget")


def main(config: PlanConfig) -> int:
    """Prints the plans. Returns the exit code.

    Raises:
        ValueError: an invalid configuration, or one that cannot fit.
    """
    _check_own(config)
    if config.budget is not None:
        print(scaling_laws.table(config.budget, _cluster_rates(config), config.cluster.name))
        return 0
    run = Config(**{field.name: getattr(config, field.name) for field in fields(Config)})
    ranks = _ranks(config)
    given = [override.partition("=")[0] for override in HydraConfig.get().overrides.task]
    fixed = {key for key in SEARCHED if key in given}
    fixed |= {"parallel"} if any(key.startswith("parallel.") and key != "parallel.auto" for key in given) else set()
    _check_settings(run, ranks, fixed)
    rates = rates_of(run.cluster.name)
    options = Options(ranks, config.plan.imbalance, config.goal == "memory", frozenset(fixed))
    found = search(run, rates, options)
    if not found.plans:
        raise ValueError(_nothing_fits(run, found, ranks))
    if config.plot:
        report.draw(found.plans, Path(config.plot))
    best = found.plans[0].prediction
    advice = failures.advise(found.plans[0].config, best.layout, best.seconds, config.plan)
    if config.format == "json":
        print(report.as_json(found.plans, advice))
    else:
        _print(run, found, rates, options, failures.describe(advice, ranks, config.plan) if advice else "")
    return 0


def _print(run: Config, found: Found, rates: Rates, options: Options, advice: str) -> None:
    best, cluster = found.plans[0], run.cluster
    nodes = -(-options.ranks // cluster.ranks_per_node)
    cost, train = best.prediction.cost, run.train
    print(
        f"{run.model.name}: {cost.total / 1e9:.4g} B parameters, {cost.active / 1e9:.4g} B active; "
        f"{options.ranks:,} GPUs on {nodes:,} node{'s' if nodes > 1 else ''} of {cluster.name}; "
        f"{train.global_batch_size:,} sequences of {train.sequence_length:,} tokens a step"
    )
    print(f"{found.considered:,} layouts and micro-batches considered\n")
    print(report.table(found.plans, cluster.memory_gb), end="\n\n")
    print(report.shares(best))
    print(report.basis(run, rates, options.imbalance))
    print(f"{advice}\n" if advice else "")
    task = [o for o in HydraConfig.get().overrides.task if o.partition("=")[0] not in (*OWN, *SEARCHED)]
    others = [o for o in task if not o.startswith(("parallel.", "parallel=", "plan."))]
    overrides = others + best.override().split()
    print(shlex.join(sbatch_command(Shape.of(cluster, options.ranks), [], overrides)))


def _check_own(config: PlanConfig) -> None:
    for key, options in (("goal", ("throughput", "memory")), ("format", ("table", "json"))):
        if getattr(config, key) not in options:
            raise ValueError(f"{key} is one of {', '.join(options)}, but {getattr(config, key)} is not; nearest: "
                             f"{key}={options[0]}")  # fmt: skip
    if config.plan.imbalance < 1:
        raise ValueError(f"plan.imbalance >= 1 (1: balanced), but it is {config.plan.imbalance:g}; nearest: "
                         "plan.imbalance=1")  # fmt: skip
    if not 0 < config.plan.gpu_mtbf_hours < math.inf:
        raise ValueError(f"plan.gpu_mtbf_hours > 0, but it is {config.plan.gpu_mtbf_hours:g}; nearest: "
                         f"plan.gpu_mtbf_hours={PlanOptions().gpu_mtbf_hours:g}")  # fmt: skip
    if not 0 <= config.plan.restart_minutes < math.inf:
        raise ValueError(f"plan.restart_minutes >= 0, but it is {config.plan.restart_minutes:g}; nearest: "
                         "plan.restart_minutes=0")  # fmt: skip
    for key in ("ranks", "nodes", "budget"):
        value = getattr(config, key)
        if value is not None and value <= 0:
            raise ValueError(f"{key} > 0, but it is {value:g}; nearest: {key}=1")


def _ranks(config: PlanConfig) -> int:
    if config.ranks is not None and config.nodes is not None:
        raise ValueError("ranks and nodes both say how many GPUs there are: give one of them")
    if config.ranks is None and config.nodes is None:
        raise ValueError("launch.plan needs the number of GPUs: nodes=N, or ranks=N")
    return config.ranks or (config.nodes or 1) * config.cluster.ranks_per_node


def _cluster_rates(config: PlanConfig) -> Rates | None:
    return rates_of(config.cluster.name) if config.cluster.name else None


def _check_settings(run: Config, ranks: int, fixed: set[str]) -> None:
    """All rules, for the settings that are not searched with values that fit any world."""
    if "parallel" in fixed:
        rules.check(run, ranks)
        return
    train = run.train
    size = train.micro_batch_size if "train.micro_batch_size" in fixed else 1
    alone = replace(run, train=replace(train, micro_batch_size=size))
    rules.check(alone, 1)


def _nothing_fits(run: Config, found: Found, ranks: int) -> str:
    cluster, have = run.cluster, f"{run.cluster.memory_gb or 0:g} GB"
    if found.too_large is None:
        batch = run.train.global_batch_size
        return (
            f"no layout of {ranks:,} ranks divides the model and train.global_batch_size={batch}: a multiple of the "
            f"number of GPUs always works; nearest: train.global_batch_size={-(-batch // ranks) * ranks}"
        )
    plan = found.too_large
    need = plan.prediction.memory_bytes / 1e9
    words = (
        f"{run.model.name} does not fit into {ranks:,} x {have} ({cluster.name}): the layout that takes least memory, "
        f"{plan.override()}, takes {need:.4g} GB per rank"
    )
    return f"{words}; nearest: {_what_would_fit(run, ranks, plan)}"


def _what_would_fit(run: Config, ranks: int, plan: Plan) -> str:
    """The first of some changes after which a layout fits."""
    rates, options = rates_of(run.cluster.name), Options
    smaller = replace(run, optim=replace(run.optim, grad_dtype="bf16", state_dtype="bf16"))
    if search(smaller, rates, options(ranks), 1).plans:
        return "optim.grad_dtype=bf16 optim.state_dtype=bf16"
    per_node, more = run.cluster.ranks_per_node, ranks
    for _ in range(12):
        more = max(more * 2, per_node)
        batch = max(run.train.global_batch_size, more)
        larger = replace(run, train=replace(run.train, global_batch_size=batch))
        if search(larger, rates, options(more), 1).plans:
            changed = f" train.global_batch_size={batch}" if batch != run.train.global_batch_size else ""
            return f"{more:,} GPUs (nodes={-(-more // per_node)}){changed}"
    view = ConfigView(run, ranks)
    return f"a shorter sequence than train.sequence_length={view['train.sequence_length']}, or a smaller model"


if __name__ == "__main__":
    if "torch" in sys.modules:
        raise AssertionError("launch.plan runs on login nodes and must not import PyTorch")
    command(PlanConfig, "config", main)
