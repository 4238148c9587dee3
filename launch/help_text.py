"""`--help`, `--version` and shell completion of every command, generated from the docstrings of the schema."""

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from conf.config_view import format_value
from conf.limits import CHOICES
from launch.overrides import CONF, preset_groups

_SUMMARY_COLUMNS = 150
OPTIONS = """\
  --help, -h            print this help and exit
  --version             print the version of Switchyard and exit
  --cfg job             print the composed configuration as YAML and exit
  --multirun, -m        one run per combination of values (key=a,b); warns about settings without effect in some of them
  --config-dir FOLDER   a directory of your own presets: FOLDER/GROUP/NAME.yaml is selected by GROUP=NAME
  -sc install=bash      shell completion: eval "$(python -m {module} -sc install=bash)"
"""
COMPLETION = r"""_switchyard_complete() {
    COMPREPLY=()
    local line=$COMP_LINE word=${COMP_WORDS[COMP_CWORD]} module
    if [[ $line =~ -m\ +(launch\.[a-z_]+) ]]; then module=${BASH_REMATCH[1]}
    elif [[ $line == *launch/train.sh* ]]; then module=launch.train
    else return; fi
    mapfile -t COMPREPLY < <(compgen -W "$(@PYTHON@ -m "$module" -sc query=bash 2>/dev/null)" -- "$word")
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o bashdefault -o default -F _switchyard_complete python python3 .venv/bin/python bash"""


def answered(arguments: list[str], schema: type, config_name: str, run: Callable[..., Any]) -> bool:
    """Handles --help, --version and shell completion. Returns whether the arguments ask for one of these.

    Raises:
        ValueError: completion for a shell other than bash.
    """
    if "--version" in arguments:
        print(f"switchyard {tomllib.loads((CONF.parent / 'pyproject.toml').read_text())['project']['version']}")
    elif "--help" in arguments or "-h" in arguments:
        print(help_text(schema, config_name, run))
    elif "-sc" in arguments or "--shell-completion" in arguments:
        wanted = [word for word in arguments if "=" in word]
        if wanted == ["install=bash"]:
            print(COMPLETION.replace("@PYTHON@", sys.executable))
        elif wanted == ["uninstall=bash"]:
            print("complete -r python python3 .venv/bin/python bash; unset -f _switchyard_complete")
        elif wanted == ["query=bash"]:
            print("\n".join(_completions(schema, config_name)))
        else:
            raise ValueError("-sc takes install=bash or uninstall=bash")
    else:
        return False
    return True


def help_text(schema: type, config_name: str, run: Callable[..., Any]) -> str:
    """The description of a command and a line for each setting: name, default and summary."""
    main = inspect.unwrap(run.func if isinstance(run, functools.partial) else run)
    module = sys.modules[main.__module__]
    name = module.__spec__.name if module.__spec__ else Path(module.__file__ or "").stem
    parts = [inspect.getdoc(module) or "", f"Usage: python -m {name} [options] [key=value ...]", OPTIONS.rstrip()]
    if presets := [f"  {group}={'|'.join(_presets(group))}" for group in _groups(config_name)]:
        parts.append("\n".join(["Presets (each sets several settings):", *presets]))
    lines = ["Settings and their defaults (before presets):"]
    for key, default, summary in settings(schema):
        lines.append(f"  {key + '=' + default:<42} {summary}".rstrip())
    return "\n\n".join([*parts, "\n".join(lines)]).replace("{module}", name)


def settings(schema: type) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, summary of its docstring) of every setting, in the order of the schema."""
    return ((key, default, _summary(text, default)) for key, default, text in documented_settings(schema))


def documented_settings(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, docstring) of every setting, in the order of the schema."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from documented_settings(hint, f"{key}.")
            continue
        has_factory = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if has_factory else field.default
        docstring = next((d[field.name] for c in schema.__mro__ if field.name in (d := _docstrings(c))), "")
        yield key, "VALUE" if value == "???" else format_value(value), docstring


@functools.cache
def _docstrings(schema: type) -> dict[str, str]:
    """The docstring below each field of a dataclass."""
    if schema is object:
        return {}
    (definition,) = [
        node
        for node in _tree(inspect.getsourcefile(schema) or "").body
        if isinstance(node, ast.ClassDef) and node.name == schema.__name__
    ]
    found = {}
    for node, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
            found[node.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


@functools.cache
def _tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text())


def _summary(docstring: str, default: str) -> str:
    """The first sentence of a setting's docstring, and what the default means (`null: no limit.`) where that fits, on
    one line of at most 150 columns."""
    first, *others = _sentences(docstring)
    of_default = [sentence for sentence in others if sentence.startswith(f"{default}: ")]
    both = " ".join([first, *of_default])
    return both if len(both) <= _SUMMARY_COLUMNS else textwrap.shorten(first, _SUMMARY_COLUMNS, placeholder=" ...")


def _sentences(text: str) -> list[str]:
    """The sentences of a text; full stops within brackets do not end one."""
    line, depth, found, start = " ".join(text.split()), 0, [], 0
    for i, letter in enumerate(line):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and line.startswith(". ", i):
            found.append(line[start : i + 1])
            start = i + 2
    return [*found, line[start:]]


def _groups(config_name: str) -> list[str]:
    """The preset groups of a command: those that its primary config has a default of."""
    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").get("defaults", [])
    own = {group for entry in defaults if not isinstance(entry, str) for group in entry}
    return sorted(group for group in preset_groups() if group.split("/")[0] in own)


def _presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _completions(schema: type, config_name: str) -> list[str]:
    """Completions: `GROUP=NAME` of presets, and `key=` of settings, with their values where these are enumerable."""
    found = [f"{group}={name}" for group in _groups(config_name) for name in _presets(group)]
    for key, default, _ in settings(schema):
        values = CHOICES.get(key, ("true", "false") if default in ("true", "false") else ("",))
        found += [f"{key}={value}" for value in values]
    return found
