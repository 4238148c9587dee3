"""The nearest whole layouts: all degrees of parallelism chosen anew for the same number of ranks."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from conf.case import Case, shown
from conf.layout_rules import cut_widths

DEGREES = ("tp", "pp", "cp", "ep", "etp")
_TRIED = 64
"""Layouts that fit the world, nearest first, for which all rules are asked."""


def nearest_layouts(case: Case, holds: Callable[[Case], bool], count: int = 2) -> list[str]:
    """The overrides of up to `count` layouts that satisfy every rule with the model, the batch and the number of ranks
    as they are, nearest first: the fewest doublings and halvings of degrees away.

    Args:
        holds: whether a case violates no rule.
    """
    found: list[str] = []
    for degrees in itertools.islice(_fitting(case), _TRIED):
        other, changed = _with(case, degrees)
        if holds(other):
            found.append(" ".join(f"parallel.{key}={shown(value)}" for key, value in changed.items()))
            if len(found) == count:
                break
    return found


def _fitting(case: Case) -> Iterator[dict[str, int]]:
    """Degrees that divide what they cut and multiply to a divisor of the world, nearest first."""
    world, experts = case["world_size"], case["model.moe.num_experts"]
    layers, widths = case["model.num_layers"], cut_widths(case)
    dense, routed = (
        math.gcd(*(case[key] for key, degree in widths if degree == f"parallel.{name}")) for name in ("tp", "etp")
    )
    heads = math.gcd(case["model.num_attention_heads"], case["model.num_query_groups"] or 0)
    cut = {"tp": math.gcd(heads, dense, case["model.vocab_size"]), "pp": layers, "cp": case["train.sequence_length"]}
    cut |= {"ep": experts or 1, "etp": routed if experts else 1}
    options = [[d for d in range(1, min(world, cut[key]) + 1) if world % d == 0 == cut[key] % d] for key in DEGREES]
    fitting = []
    for chosen in itertools.product(*options):
        tp, pp, cp, ep, etp = chosen
        if world % (tp * pp * cp) == 0 and world % (etp * ep * pp) == 0:
            was = (max(1, case[f"parallel.{key}"]) for key in DEGREES)
            away = sum(abs(math.log2(new / old)) for new, old in zip(chosen, was, strict=True))
            fitting.append((away, chosen))
    return (dict(zip(DEGREES, chosen, strict=True)) for _, chosen in sorted(fitting))


def _with(case: Case, degrees: dict[str, int]) -> tuple[Case, dict[str, Any]]:
    """(the case under other degrees, what changed). What the degrees leave without an effect or without a sense goes
    back to its default."""
    settings: dict[str, Any] = dict(degrees)
    chunks = degrees["pp"] * (case["parallel.vpp"] or 1)
    if degrees["pp"] == 1 or case["model.num_layers"] % chunks:
        settings["vpp"] = None
    settings["pp_layers"] = None
    if degrees["tp"] == 1:
        settings["sequence_parallel"] = False
    changed = {key: value for key, value in settings.items() if case[f"parallel.{key}"] != value}
    for key, value in changed.items():
        case = case.replaced(f"parallel.{key}", value)
    return case, changed
