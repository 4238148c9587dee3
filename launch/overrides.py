"""Prepares the command line for Hydra: quotes text settings and rejects unknown keys."""

import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from conf.hydra_private import parse_options
from conf.override_text import as_typed
from launch.config_folders import check_folders
from launch.settings import nearest_settings

CONF = Path(__file__).resolve().parent.parent / "conf"


def preset_groups() -> set[str]:
    """The groups of presets: `model`, `data`, `cluster` and so on."""
    return {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")}


def checked_arguments(arguments: list[str], keys: dict[str, Any]) -> list[str]:
    """The arguments for Hydra, with text settings quoted for its grammar.

    Raises:
        ValueError: unknown settings, including those that Hydra would accept (`+unknown=1`), and presets that are not
            allowed (see launch/config_folders.py).
    """
    options, unknown = parse_options(arguments)
    if options.shell_completion:
        return arguments
    if unknown:
        hint = "settings are given as key=value, without dashes" if unknown[0].startswith("-") else "put options first"
        raise ValueError(f"{unknown[0]} is not a valid argument: {hint}; see --help")
    groups = preset_groups()
    typed = {word: as_typed(word, keys, sweep=options.multirun) for word in options.overrides}
    overrides = OverridesParser.create().parse_overrides(list(typed.values()))
    for override in overrides:
        check_override(override, keys, groups)
    check_folders(options, overrides, groups)
    return [typed.get(word, word) for word in arguments]


def check_override(override: Override, keys: dict[str, Any], groups: set[str]) -> None:
    """Raises ValueError if the setting or preset group does not exist, or is added (+) or removed (~)."""
    key = override.key_or_group
    if re.match(r"hydra\b", key):
        return
    if key not in keys and key not in groups:
        raise ValueError(f"there is no setting {key}; {nearest_settings(key, [*keys, *sorted(groups)])}")
    if override.is_delete():
        raise ValueError(f"{override.input_line}: {key} cannot be removed, only set: {key}=VALUE")
    if override.is_add() and key in keys and key not in groups:
        raise ValueError(f"{override.input_line}: {key} exists already; drop the +")
