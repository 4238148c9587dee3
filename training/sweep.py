"""Runs of a sweep (`--multirun`): their names, and settings that a run of the sweep does not use."""

import hashlib
import re
import sys
from collections.abc import Iterable, Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import read_write

from conf import rules
from conf.config_view import format_value
from conf.hydra_private import parse_options
from conf.override_text import override
from conf.schema import Config

_LONGEST = 100  # characters of a directory's name, which may have 255 bytes


def sweeping() -> bool:
    """Whether this process runs a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def reset_unused(config: Config, world_size: int) -> tuple[Config, list[str]]:
    """In a sweep, resets settings to their defaults that other runs of the sweep use and this one does not, as in
    `model.moe.num_experts=0,2 model.moe.top_k=2`; Hydra's recorded overrides are adjusted. Outside of a sweep nothing
    is changed, and `rules.check` rejects such settings.

    Returns:
        (the configuration, a warning for each setting that was reset).
    """
    if not sweeping():
        return config, []
    fitting, reset = rules.reset_unused(config, world_size)
    task = HydraConfig.instance().cfg.hydra.overrides
    with read_write(task):
        kept = [word for word in task.task if word.partition("=")[0].lstrip("+") not in reset]
        task.task = [*kept, *(override(key, value) for key, (value, _) in reset.items())]
    return fitting, [
        f"{why}; this run of the sweep has {key}={format_value(value)}" for key, (value, why) in reset.items()
    ]


def name_in_sweep() -> str | None:
    """The swept settings of this run, for the name of its directory. None: nothing is swept."""
    if not sweeping():
        return None
    options, _ = parse_options(sys.argv[1:])
    return arm_name(options.overrides, HydraConfig.get().overrides.task, HydraConfig.get().sweeper.params or ())


def arm_name(typed: Sequence[str], arm: Sequence[str], parameters: Iterable[str] = ()) -> str | None:
    """The swept settings as `lr=0.001,top_k=2`, with the last part of their names where that is unique.

    Args:
        typed: the overrides of the whole sweep.
        arm: the overrides of one of its runs.
        parameters: settings that are swept through hydra.sweeper.params.
    """
    parse = OverridesParser.create().parse_overrides
    keys = {found.key_or_group for found in parse(list(typed)) if found.is_sweep_override()} | set(parameters)
    last = [key.rpartition(".")[2] for key in keys]
    parts = []
    for word, found in zip(arm, parse(list(arm)), strict=True):
        if (key := found.key_or_group) in keys:
            short = key.rpartition(".")[2]
            parts.append(f"{short if last.count(short) == 1 else key}={word.partition('=')[2]}")
    text = ",".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._+=,-]", "_", text)
    if safe != text or len(safe) > _LONGEST:  # a hash keeps changed or shortened names unique
        safe = f"{safe[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return safe or None
