"""The reference pages of all settings and commands, as Markdown, from the schema and its docstrings."""

import ast
import dataclasses
import html
import inspect
import re
from collections.abc import Iterator
from typing import get_type_hints

from conf import commands
from conf.inspect_data_config import InspectDataConfig
from conf.limits import CHOICES
from conf.schema import Config
from conf.score_config import ScoreConfig
from launch.help_text import documented_settings
from launch.overrides import CONF

COMMANDS = {
    "prepare": commands.PrepareConfig,
    "data": InspectDataConfig,
    "check": commands.CheckConfig,
    "plan": commands.PlanConfig,
    "scaling": None,
    "compare": None,
    "evaluate": commands.EvaluateConfig,
    "score": ScoreConfig,
    "inspect": commands.InspectConfig,
    "generate": commands.GenerateConfig,
    "chat": commands.ChatConfig,
    "import_hf": commands.ImportConfig,
    "import_megatron": commands.ImportMegatronConfig,
    "upcycle": commands.UpcycleConfig,
    "export_hf": commands.ExportConfig,
}
"""The commands beside training, by module of `launch`, with their settings: None where there are none."""


def settings_page() -> str:
    """Every setting of a training run, section by section."""
    text = """# Settings

Every setting of a run, with its default before presets and what it means: `bash launch/train.sh KEY=VALUE ...`. Presets
(`model=`, `data=`, `cluster=`, `parallel=`) set several at once. `bash launch/train.sh --help` prints the first
sentence of each; `--cfg job` prints what a command line amounts to.
"""
    return text + "".join(_sections(Config))


def commands_page() -> str:
    """Every other command, with its settings."""
    text = "# Commands\n\nThe commands beside `bash launch/train.sh`, each with its settings.\n"
    for name, schema in COMMANDS.items():
        documentation = ast.get_docstring(ast.parse((CONF.parent / f"launch/{name}.py").read_text()))
        text += f"\n## launch.{name}\n\n```text\n{documentation}\n```\n"
        if schema is None:
            continue
        if issubclass(schema, Config):
            run = {key for key, *_ in documented_settings(Config)}
            own = [one for one in documented_settings(schema) if one[0] not in run]
            text += f"\nAll [settings of a run](settings.md), and {', '.join(f'`{key}`' for key, *_ in own)}:\n"
            text += "".join(_entry(name, *one) for one in own)
        else:
            text += "".join(_entry(name, *one) for one in documented_settings(schema))
    return text


def _sections(schema: type, section: str = "") -> Iterator[str]:
    """The settings of a dataclass, and then a section for each dataclass in it."""
    hints = get_type_hints(schema)
    nested = [field.name for field in dataclasses.fields(schema) if dataclasses.is_dataclass(hints[field.name])]
    prefix = f"{section}." if section else ""
    if section:
        yield f"\n## {section}\n"
        if not (schema.__doc__ or "").startswith(f"{schema.__name__}("):  # what dataclass writes where there is none
            yield f"\n{markdown(inspect.getdoc(schema) or '')}\n"
    for key, default, text in documented_settings(schema, prefix):
        if key.removeprefix(prefix).split(".")[0] not in nested:
            yield _entry("", key, default, text)
    for name in nested:
        yield from _sections(hints[name], prefix + name)


def _entry(page: str, key: str, default: str, text: str) -> str:
    """A setting as a term of a definition list, which links lead to by its key."""
    anchor = f"{page}.{key}" if page else key
    shown = "required" if default == "VALUE" else f"default `{default}`"
    values = "" if key not in CHOICES or page else ": " + ", ".join(f"`{value}`" for value in _spelt(CHOICES[key]))
    term = f'<span id="{anchor}">`{key}`</span> ({shown}{values})'
    return f"\n{term}\n:   {markdown(text)}\n"


def _spelt(values: tuple[object, ...]) -> list[str]:
    """As they are written on the command line."""
    return [{None: "null", True: "true", False: "false"}.get(value, str(value)) for value in values]  # type: ignore[call-overload]


def markdown(text: str) -> str:
    """Plain text on one line with nothing that Markdown or HTML would take for markup, except `code`."""
    words = re.split("(`[^`]*`)", " ".join(text.split()))
    return "".join(word if word.startswith("`") else _escaped(word) for word in words)


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_\[\]#])", r"\\\1", html.escape(text, quote=False))
