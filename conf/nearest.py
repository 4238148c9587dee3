"""Suggests the valid layouts that are nearest to an invalid one, for the same number of ranks."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from conf.config_view import ConfigView, format_value
from conf.layout_rules import sharded_widths

DEGREES = ("tp", "pp", "cp", "ep", "etp")
_MAX_CANDIDATES = 64
"""Maximum number of candidate layouts that are checked against all rules."""


def nearest_layouts(cfg: ConfigView, is_valid: Callable[[ConfigView], bool], count: int = 2) -> list[str]:
    """The overrides of up to `count` layouts that satisfy all rules with the given model, batch and number of ranks,
    nearest first: with the fewest doublings and halvings of degrees.

    Args:
        is_valid: whether a configuration violates no rule.
    """
    found: list[str] = []
    for degrees in itertools.islice(_candidates(cfg), _MAX_CANDIDATES):
        other, changed = _apply(cfg, degrees)
        if is_valid(other):
            found.append(" ".join(f"parallel.{key}={format_value(value)}" for key, value in changed.items()))
            if len(found) == count:
                break
    return found


def _candidates(cfg: ConfigView) -> Iterator[dict[str, int]]:
    """Degrees that divide the sizes that they shard, and whose products divide the world size, nearest first."""
    world, experts = cfg["world_size"], cfg["model.moe.num_experts"]
    layers, widths = cfg["model.num_layers"], sharded_widths(cfg)
    dense, routed = (
        math.gcd(*(cfg[key] for key, degree in widths if degree == f"parallel.{name}")) for name in ("tp", "etp")
    )
    heads = math.gcd(cfg["model.num_attention_heads"], cfg["model.num_query_groups"] or 0)
    sharded = {"tp": math.gcd(heads, dense, cfg["model.vocab_size"]), "pp": layers, "cp": cfg["train.sequence_length"]}
    sharded |= {"ep": experts or 1, "etp": routed if experts else 1}
    options = [
        [d for d in range(1, min(world, sharded[key]) + 1) if world % d == 0 == sharded[key] % d] for key in DEGREES
    ]
    candidates = []
    for degrees in itertools.product(*options):
        tp, pp, cp, ep, etp = degrees
        if world % (tp * pp * cp) == 0 and world % (etp * ep * pp) == 0:
            was = (max(1, cfg[f"parallel.{key}"]) for key in DEGREES)
            distance = sum(abs(math.log2(new / old)) for new, old in zip(degrees, was, strict=True))
            candidates.append((distance, degrees))
    return (dict(zip(DEGREES, degrees, strict=True)) for _, degrees in sorted(candidates))


def _apply(cfg: ConfigView, degrees: dict[str, int]) -> tuple[ConfigView, dict[str, Any]]:
    """(the configuration with other degrees, the changed settings). Settings that the degrees make invalid or unused
    are reset to their defaults."""
    settings: dict[str, Any] = dict(degrees)
    chunks = degrees["pp"] * (cfg["parallel.vpp"] or 1)
    if degrees["pp"] == 1 or cfg["model.num_layers"] % chunks:
        settings["vpp"] = None
    if degrees["cp"] == 1:
        settings["cp_comm_type"] = "all_gather"
    settings["pp_layers"] = settings["pp_layout"] = None
    if degrees["tp"] == 1:
        settings["sequence_parallel"] = False
    changed = {key: value for key, value in settings.items() if cfg[f"parallel.{key}"] != value}
    for key, value in changed.items():
        cfg = cfg.replace(f"parallel.{key}", value)
    return cfg, changed
