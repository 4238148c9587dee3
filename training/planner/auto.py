"""parallel=auto: the layout of a start is chosen for the ranks that it has. Does not import torch.

A micro-batch is the same for every number of ranks, since routing, capacity and balancing are defined over it; the
global batch is, too, so that the number of micro-batches per rank changes.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from conf import rules
from conf.commands import PlanOptions
from conf.config_view import ConfigView, format_value, multiples
from conf.rules import violations
from conf.schema import Config, ParallelConfig
from parallel.layout import Layout

if TYPE_CHECKING:
    from training.planner.search import Options

VARIABLE = "SWITCHYARD_LAYOUT"
"""Passes the settings that the batch script has chosen to the ranks."""
CHOSEN = tuple(f"parallel.{field.name}" for field in fields(ParallelConfig))
SAVERS = ("model.recompute", "optim.cpu_offload")
"""Are set only where nothing fits into memory without them."""
_TRIED = 64
"""For a message: numbers of ranks in each direction that are tried, and candidates of each that are checked."""


@dataclass(frozen=True)
class Choice:
    """A layout that was chosen."""

    config: Config
    """The configuration with it."""
    layout: Layout
    why: str

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were chosen."""
        view = ConfigView(self.config, self.layout.world)
        return {key: view[key] for key in (*CHOSEN, *SAVERS)}


def resolve(config: Config, ranks: int, ranks_per_node: int, env: Mapping[str, str] = os.environ) -> Config:
    """The configuration of a start with this number of ranks. The ranks of a Slurm job take what their batch script has
    chosen; other processes choose, all of them alike.

    Raises:
        ValueError: no layout of these ranks is valid and fits.
    """
    if not config.parallel.auto:
        return config
    if env.get(VARIABLE):
        view = ConfigView(config, ranks)
        for key, value in json.loads(env[VARIABLE]).items():
            view = view.replace(key, value)
        return view.config
    return choose(config, ranks, ranks_per_node).config


def choose(config: Config, ranks: int, ranks_per_node: int) -> Choice:
    """The layout for a number of ranks.

    Args:
        ranks_per_node: of this start, whatever config.cluster says.

    Raises:
        ValueError: no layout of these ranks is valid and fits, with the numbers of ranks that have one.
    """
    prepared = _prepared(config, ranks_per_node)
    choice = _choose(prepared, ranks)
    if choice is None:
        raise ValueError(_nothing(prepared, ranks, ranks_per_node))
    return replace(choice, config=replace(choice.config, cluster=config.cluster))


def choose_nodes(config: Config, nodes: int, ranks_per_node: int) -> tuple[int, Choice, str | None]:
    """The layout for the largest number of nodes that has one.

    Returns:
        (number of nodes, its layout, a warning if some nodes are left out).

    Raises:
        ValueError: as `choose`.
    """
    prepared = _prepared(config, ranks_per_node)
    for used in range(nodes, 0, -1):
        choice = _choose(prepared, used * ranks_per_node)
        if choice is not None:
            left_out = None if used == nodes else _nothing(prepared, nodes * ranks_per_node, ranks_per_node)
            warning = left_out and f"only {used} of {nodes} nodes are used: {left_out}"
            return used, replace(choice, config=replace(choice.config, cluster=config.cluster)), warning
        if next(_valid(prepared, used * ranks_per_node), None) is not None:
            break  # it does not fit into memory, and even less so on fewer nodes
    raise ValueError(_nothing(prepared, nodes * ranks_per_node, ranks_per_node))


def _prepared(config: Config, ranks_per_node: int) -> Config:
    """The configuration without a layout, for nodes of this size.

    Raises:
        ValueError: it is invalid under every layout.
    """
    for violation in violations(ConfigView(config, 1)):
        if violation.unused and violation.rule.endswith(" parallel.auto=false"):
            ((key, (value,)),) = violation.suggestions.items()
            raise ValueError(f"{violation.rule}, but {violation.actual}; nearest: {key}={format_value(value)}")
    parallel = replace(config.parallel, auto=False)
    cluster = replace(config.cluster, ranks_per_node=ranks_per_node)
    config = replace(config, parallel=parallel, cluster=cluster)
    alone = replace(config, parallel=ParallelConfig())
    # What is unused on one rank may be used on several.
    if any(not violation.unused for violation in violations(ConfigView(alone, 1))):
        rules.check(alone, 1)
    return config


def _choose(config: Config, ranks: int) -> Choice | None:
    """The best layout of these ranks; None: none is valid and fits."""
    from training.planner.rates import has_rates, rates_of
    from training.planner.search import search

    if not has_rates(config.cluster.name):
        return _simplest(config, ranks)
    found = search(config, rates_of(config.cluster.name), _options(config, ranks), 1)
    if not found.plans:
        return None
    plan = found.plans[0]
    why = f"fastest of {found.considered:,} considered: about {plan.prediction.seconds:.3g} s a step"
    return Choice(plan.config, plan.prediction.layout, why)


def _options(config: Config, ranks: int) -> "Options":
    from training.planner.search import Options

    fixed = {"train.micro_batch_size"} | {key for key in SAVERS if ConfigView(config, ranks)[key]}
    return Options(ranks, PlanOptions().imbalance, fixed=frozenset(fixed))


def _valid(config: Config, ranks: int, first: int | None = None) -> Iterator[tuple[Config, Layout]]:
    """Layouts of these ranks that satisfy all rules.

    Args:
        first: only this many candidates are checked; None: all.
    """
    from training.planner.search import candidates

    for candidate, layout in itertools.islice(candidates(config, _options(config, ranks)), first):
        if not violations(ConfigView(candidate, ranks)):
            yield candidate, layout


def _simplest(config: Config, ranks: int) -> Choice | None:
    """Where there are no rates: the layout with as little as possible, in this order, of cp, pp, tp, vpp, etp,
    recomputation and ep, as docs/guides/layouts.md recommends."""
    from training.memory_estimate import memory_per_rank
    from training.planner.search import USABLE, candidates, with_recompute

    options, memory_gb = _options(config, ranks), config.cluster.memory_gb
    bf16 = config.precision in ("bf16", "fp8") or (config.precision == "auto" and config.cluster.gpus)
    found = [
        ((x.cp, x.pp, x.tp, x.vpp, x.etp, saving, x.ep), other, x)
        for candidate, x in candidates(config, options)
        for saving, other in enumerate(with_recompute(candidate, options))
    ]
    for _, other, layout in sorted(found, key=lambda item: item[0]):
        fits = memory_gb is None or memory_per_rank(other, layout, bf16=bf16).total <= USABLE * memory_gb * 1e9
        if fits and not violations(ConfigView(other, ranks)):
            return Choice(other, layout, "the simplest that fits: there are no rates of this machine")
    return None


def _nothing(config: Config, ranks: int, ranks_per_node: int) -> str:
    """Why no layout of these ranks is valid or fits, and which numbers of ranks or which batch would do."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if next(_valid(config, ranks), None) is not None:
        smaller = f" or train.micro_batch_size={micro // 2}" if micro > 1 else ""
        return (
            f"no layout of {ranks:,} ranks fits into {config.cluster.memory_gb:g} GB per rank with "
            f"train.micro_batch_size={micro}, which parallel=auto keeps; nearest: more nodes{smaller}"
        )
    below = range(ranks - ranks_per_node, 0, -ranks_per_node)
    above = range(ranks + ranks_per_node, ranks + (_TRIED + 1) * ranks_per_node, ranks_per_node)
    near = [n for sizes in (below, above) for n in itertools.islice(_having_one(config, sizes), 2)]
    numbers = ", ".join(f"{n:,}" for n in sorted(near)) or "none near it"
    words = (
        f"no layout of {ranks:,} ranks divides the model and train.global_batch_size={batch} into micro-batches of "
        f"train.micro_batch_size={micro}; numbers of ranks that do: {numbers}"
    )
    other = next((size for size in multiples(batch, micro * ranks) if _would_do(config, ranks, size)), None)
    return words + (f"; or for {ranks:,} ranks train.global_batch_size={format_value(other)}" if other else "")


def _having_one(config: Config, sizes: range) -> Iterator[int]:
    """The numbers of ranks, of the first few, that have a valid layout."""
    return (n for n in sizes[:_TRIED] if next(_valid(config, n, _TRIED), None) is not None)


def _would_do(config: Config, ranks: int, batch: int) -> bool:
    other = replace(config, train=replace(config.train, global_batch_size=batch))
    return next(_valid(other, ranks, _TRIED), None) is not None
