"""Finds the layouts of a model on a cluster that fit into memory, fastest first."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from conf.config_view import ConfigView, format_value
from conf.pipeline_layout import distribute
from conf.rules import violations
from conf.schema import Config, ParallelConfig
from parallel.layout import Layout
from training.memory_estimate import Stage, stages_of
from training.planner.rates import Rates
from training.planner.step import GPU_OVERHEAD, Prediction, memory_of, predict

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE: tuple[tuple[str, ...], ...] = ((), ("norm", "activation"), ("moe",), ("full",))
"""From the fastest to the one that takes least memory."""
LONG = 8192
"""Tokens per rank from which on context parallelism is tried."""
SHORTER = 2
"""Layers."""
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill: the allocator's fragmentation takes the rest."""


@dataclass(frozen=True)
class Options:
    """What is searched."""

    ranks: int
    imbalance: float = 1.0
    by_memory: bool = False
    """Order by memory instead of time."""
    fixed: frozenset[str] = frozenset()
    """Settings that keep the configuration's value: parallel, train.micro_batch_size, model.recompute,
    optim.cpu_offload."""


@dataclass(frozen=True)
class Plan:
    """A configuration and what is predicted for it."""

    config: Config
    prediction: Prediction

    def override(self) -> str:
        """The settings of this plan, as overrides."""
        p, c = self.config.parallel, self.config
        degrees: dict[str, object] = {
            f"parallel.{name}": getattr(p, name)
            for name in (
                *("tp", "pp", "vpp", "cp", "ep", "etp", "sequence_parallel", "pp_layers", "pp_layout"),
                "optimizer_instances",
            )
            if getattr(p, name) != getattr(ParallelConfig(), name)
        }
        degrees["train.micro_batch_size"] = c.train.micro_batch_size
        degrees |= {"model.recompute": c.model.recompute} if c.model.recompute else {}
        degrees |= {"optim.cpu_offload": True} if c.optim.cpu_offload else {}
        return " ".join(f"{key}={format_value(value)}" for key, value in degrees.items())


@dataclass
class Found:
    """The result of a search."""

    plans: list[Plan] = field(default_factory=list)
    """That fit, best first."""
    too_large: Plan | None = None
    """The one that takes least memory, if none fits."""
    considered: int = 0


def search(config: Config, rates: Rates, options: Options, count: int = 5) -> Found:
    """The `count` best plans. Every one satisfies all rules (conf/rules.py)."""
    limit = USABLE * (config.cluster.memory_gb or math.inf) * 1e9 - GPU_OVERHEAD
    found, fitting = Found(), []
    smallest: tuple[float, Config, Layout] | None = None
    known: dict[object, list[Stage]] = {}
    for candidate, layout in candidates(config, options):
        found.considered += 1
        kind = layout.pp, layout.vpp, layout.pp_layers
        stages = known.setdefault(kind, []) or stages_of(config.model, layout)
        known[kind] = stages
        floors: dict[bool, float] = {}  # of memory, by cpu_offload: without activations
        for other in with_recompute(candidate, options):
            floor = floors.get(other.optim.cpu_offload, 0.0)
            if floor > limit and smallest is not None and floor >= smallest[0]:
                continue
            memory = memory_of(other, layout, options.imbalance, stages)
            floors[other.optim.cpu_offload] = memory.total - memory.activations
            if memory.total <= limit:
                prediction = predict(other, layout, rates, imbalance=options.imbalance, stages=stages)
                fitting.append(Plan(other, prediction))
                if not options.by_memory:
                    break  # further recomputation is only slower
            elif smallest is None or memory.total < smallest[0]:
                smallest = memory.total, other, layout
    key = _memory_first if options.by_memory else _time_first
    for plan in sorted(fitting, key=key):
        if len(found.plans) == count:
            break
        if not violations(ConfigView(plan.config, options.ranks)) and not _is_repeated(plan, found.plans):
            found.plans.append(plan)
    if not found.plans and smallest is not None:
        _, other, layout = smallest
        found.too_large = Plan(other, predict(other, layout, rates, imbalance=options.imbalance))
    return found


def _time_first(plan: Plan) -> tuple[float, float]:
    return plan.prediction.seconds, plan.prediction.memory.total


def _memory_first(plan: Plan) -> tuple[float, float]:
    return plan.prediction.memory.total, plan.prediction.seconds


def _is_repeated(plan: Plan, plans: list[Plan]) -> bool:
    """Whether a better plan has the same degrees and differs only in virtual stages, micro-batch or recomputation."""
    return any(_degrees(plan) == _degrees(other) for other in plans)


def _degrees(plan: Plan) -> tuple[int, ...]:
    p = plan.config.parallel
    return p.tp, p.pp, p.cp, p.ep, p.etp


def with_recompute(config: Config, options: Options) -> Iterator[Config]:
    """The ways to save memory under a layout, fastest first."""
    kinds: Iterable[tuple[str, ...]] = RECOMPUTE
    if "model.recompute" in options.fixed:
        kinds = (tuple(config.model.recompute),)
    offloads = [config.optim.cpu_offload] if "optim.cpu_offload" in options.fixed else [False, True]
    for offload, kind in itertools.product(offloads, kinds):
        if "moe" in kind and not config.model.moe.num_experts:
            continue
        model = replace(config.model, recompute=list(kind))
        yield replace(config, model=model, optim=replace(config.optim, cpu_offload=offload))


def candidates(config: Config, options: Options) -> Iterator[tuple[Config, Layout]]:
    """Layouts and micro-batches that divide what they have to divide."""
    batch = config.train.global_batch_size
    sizes: Iterable[int] = MICRO_BATCHES
    if "train.micro_batch_size" in options.fixed:
        sizes = (config.train.micro_batch_size,)
    for parallel in _layouts(config, options):
        layout = Layout.of(parallel, options.ranks)
        for size in sizes:
            if batch % (size * layout.dp):
                continue
            if layout.vpp > 1 and batch // (size * layout.dp) % layout.pp:
                continue
            train = replace(config.train, micro_batch_size=size)
            yield replace(config, train=train, parallel=parallel), layout


def _layouts(config: Config, options: Options) -> Iterator[ParallelConfig]:
    if "parallel" in options.fixed:
        yield config.parallel
        return
    ranks, model, cluster = options.ranks, config.model, config.cluster
    experts = model.moe.num_experts
    per_rank = config.train.sequence_length
    sharded = math.gcd(model.num_attention_heads, model.query_groups, model.vocab_size, model.ffn_hidden_size)
    tps = [d for d in _divisors(sharded) if d <= cluster.ranks_per_node and ranks % d == 0]
    cps = [d for d in _divisors(ranks) if d == 1 or (per_rank // d >= LONG // 2 and per_rank % (2 * d) == 0)]
    pps = [d for d in _divisors(ranks) if d <= model.num_layers]
    eps = _divisors(experts) if experts else [1]
    for tp, cp, pp, ep in itertools.product(tps, cps, pps, eps):
        for etp in {1, tp} if experts else {1}:
            if ranks % (tp * cp * pp) or ranks % (etp * ep * pp) or model.expert_width % etp:
                continue
            if math.gcd(ranks // (tp * cp * pp), ranks // (etp * ep * pp)) % config.parallel.optimizer_instances:
                continue
            for vpp, layers in stage_sizes(model.num_layers, pp):
                yield replace(
                    config.parallel, tp=tp, sequence_parallel=tp > 1, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp,
                    pp_layers=layers, auto=False,
                )  # fmt: skip


def stage_sizes(layers: int, pp: int) -> Iterator[tuple[int | None, list[int] | None]]:
    """(virtual stages, layers of each chunk where they are uneven). Without virtual stages the last one, which has the
    output layer, is tried with up to SHORTER layers less than its share."""
    for vpp in (1, 2, 4, 8) if pp > 1 else (1,):
        chunks = pp * vpp
        if chunks <= layers:
            even = layers % chunks == 0
            if not even and layers < 3 * chunks and vpp > 1:
                continue  # a chunk would have half as many layers again as another one
            # The last chunks, which are followed by the output layer, are the shorter ones.
            yield (vpp if vpp > 1 else None), None if even else distribute(layers, chunks)
        if vpp == 1 < pp:
            for less in range(1, SHORTER + 1):
                sizes = distribute(layers + less, pp)
                if sizes[-1] >= less and min(sizes) > 0:
                    yield None, [*sizes[:-1], sizes[-1] - less]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
