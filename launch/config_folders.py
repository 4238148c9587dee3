"""Validates directories of presets, which may be untrusted (`--config-dir`, `hydra.searchpath`): they may contain only
presets of the existing groups, and nothing that runs a program or reads other environment variables or files."""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

RESOLVERS = ("now", "oc.select")
"""Resolvers that a preset may use, besides `oc.env` of ENVIRONMENT and interpolations of other settings."""
ENVIRONMENT = ("HOME", "PROJECT", "SCRATCH", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "TMPDIR", "USER", "WORK")
"""Environment variables that a preset may read by `${oc.env:NAME}`."""
_RESOLVER = re.compile(r"\$\{\s*([^\s:${}]+)\s*:(?=\s*([^,}]*))")


def check_folders(options: argparse.Namespace, overrides: Iterable[Override], groups: set[str]) -> None:
    """Validates every directory of presets that the command line names.

    Args:
        options: Hydra's options.
        groups: the groups of presets.

    Raises:
        ValueError: a file there is not a preset of these groups, or something other than a directory is named.
    """
    for name in ("config_path", "config_name", "experimental_rerun"):
        if value := getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option}={value} is not supported. Your own presets are files FOLDER/GROUP/NAME.yaml, with GROUP "
                f"one of {', '.join(sorted(groups))}, selected by --config-dir=FOLDER GROUP=NAME"
            )
    folders = [options.config_dir] if options.config_dir else []
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            value = override.value()
            folders += value if isinstance(value, list) else [value]
        elif override.key_or_group in groups and "/" in override.input_line.partition("=")[2]:
            raise ValueError(f"{override.input_line}: a preset is a name, without a path: FOLDER/GROUP/NAME.yaml")
    for folder in folders:
        _check_folder(Path(str(folder).removeprefix("file://")), str(folder), groups)


def _check_folder(path: Path, name: str, groups: set[str]) -> None:
    if not path.is_dir():
        raise ValueError(f"{name} is not a folder of presets; name an existing directory")
    if (path / "hydra").exists():
        raise ValueError(f"{path / 'hydra'} would configure Hydra itself, which can run programs; remove it")
    for group in sorted(groups):
        for file in sorted((path / group).glob("*.y*ml")):
            _check_file(file, groups)


def _check_file(file: Path, groups: set[str]) -> None:
    try:
        text = file.read_text()
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, ValueError, OmegaConfBaseException, YAMLError):
        return  # Hydra reports the error if the preset is used
    if re.search(r"^\s*#\s*@package", text, re.MULTILINE):
        raise ValueError(f"{file}: @package is not supported: a preset sets only its own group")
    for key, value in _walk(content):
        if key in ("_target_", "hydra") or key.startswith(("hydra/", "/hydra", "override hydra", "override /hydra")):
            raise ValueError(f"{file}: {key} is not allowed in a preset: it can run programs")
        if key == "defaults":
            _check_defaults(file, value, groups)
        if isinstance(value, str):
            _check_interpolations(file, key, value)


def _check_defaults(file: Path, defaults: Any, groups: set[str]) -> None:
    """Allows only presets of the existing groups in a defaults list, which are validated too: NAME of the same group,
    or /GROUP: NAME. A path could lead anywhere."""
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        for group, names in entry.items() if isinstance(entry, dict) else [(None, entry)]:
            path = str(group).removeprefix("override ").removeprefix("optional ")
            wrong = [group] if group is not None and (path[:1] != "/" or path[1:] not in groups) else []
            wrong += [name for name in (names if isinstance(names, list) else [names]) if set("/@$") & set(str(name))]
            if wrong:
                raise ValueError(f"{file}: defaults: {wrong[0]} is not allowed in a preset; only names of presets are")


def _check_interpolations(file: Path, key: str, text: str) -> None:
    for resolver, argument in _RESOLVER.findall(text):
        if resolver == "oc.env" and argument.strip() in ENVIRONMENT:
            continue
        if resolver not in RESOLVERS:
            allowed = ", ".join([*(f"${{{name}:...}}" for name in RESOLVERS), "${oc.env:NAME}"])
            raise ValueError(
                f"{file}: {key}: ${{{resolver}:{argument}}} is not allowed in a preset. Allowed are {allowed}, NAME "
                f"being one of {', '.join(ENVIRONMENT)}; use the command line for anything else"
            )


def _walk(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested dictionaries and lists; the elements of a list have its key."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield str(name), value
            yield from _walk(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield key, value
            yield from _walk(value, key)
