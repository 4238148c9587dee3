"""Quotes text in overrides for Hydra's grammar: text as typed on the command line, and commands printed for copying."""

import re
import shlex
import types
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from conf.hydra_private import unconverted_value

FREE_TEXT = ("prompt", "eval.sample_prompt")
"""Settings whose text is taken literally: `${...}` in it is not an interpolation."""
_PLAIN = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*")
_ELEMENT = re.compile(r"""(\s*'(?:\\.|[^'\\])*'\s*|\s*"(?:\\.|[^"\\])*"\s*|[^,]*),""")
_OTHER_THAN_TEXT = ("null", "true", "false", "nan", "inf")


def override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar, for any characters in a text or list of texts. Not quoted for a shell."""
    if isinstance(value, list):
        return f"{key}=[{','.join(_element(element) for element in value)}]"
    return f"{key}={_element(value)}"


def command(words: Sequence[str], overrides: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """A command line for a shell. `overrides`: as returned by `override`, or as typed."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    return " ".join([*assignments, *(shell_word(word) for word in [*words, *overrides])])


def setting(key: str, value: Any) -> str:
    """`override`, quoted for a shell: for messages that suggest an override."""
    return shell_word(override(key, value))


def shell_word(word: str) -> str:
    """Quoted for a shell if necessary; in double quotes if possible, since Hydra's quotes are single ones."""
    plain = shlex.quote(word)
    return plain if plain == word or set('"$`\\!') & set(word) else f'"{word}"'


def _element(value: Any) -> str:
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _OTHER_THAN_TEXT:
        return value
    return _quoted(value, literal=True)


def _quoted(text: str, *, literal: bool) -> str:
    """Quoted for Hydra. `literal`: escape interpolations."""
    if literal:
        text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    return QuotedString(text, Quote.single).with_quotes()


def as_typed(word: str, hints: Mapping[str, Any], *, sweep: bool) -> str:
    """An override in Hydra's grammar that sets a text setting to what was typed: `prompt=def f(x):` becomes
    `prompt='def f(x):'`. Quoted values and overrides of other settings are returned unchanged.

    Args:
        hints: the type of every setting.
        sweep: whether commas may separate the values of a sweep (--multirun).
    """
    name, equals, value = word.partition("=")
    key = name.lstrip("+")
    if not equals or key not in hints:
        return word
    text, texts = _takes_text(hints[key])
    if texts and (not text or value.startswith("[")):
        return f"{name}={_list(value, sweep=sweep, or_text=text)}"
    if text:
        optional = type(None) in get_args(hints[key])
        return f"{name}={_text(value, literal=key in FREE_TEXT, sweep=sweep, optional=optional)}"
    return word


def _takes_text(hint: Any) -> tuple[bool, bool]:
    """Whether a setting may be a text, and whether it may be a list of texts."""
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    return str in kinds or Any in kinds, list[str] in kinds or Any in kinds


def _parsed(value: str) -> Any:
    """A value as Hydra parses it, None for null. Raises ValueError if it cannot be parsed."""
    try:
        (found,) = OverridesParser.create().parse_overrides([f"key={value}"])
    except (HydraException, ValueError):
        raise ValueError(value) from None
    return unconverted_value(found) if not found.is_sweep_override() else found


def _text(value: str, *, literal: bool, sweep: bool, optional: bool) -> str:
    try:
        found = _parsed(value)
    except ValueError:
        return _quoted(value, literal=literal)
    if isinstance(found, QuotedString) or (found is None and optional):
        return value
    if hasattr(found, "is_sweep_override"):
        return value if sweep else _quoted(value, literal=literal)
    if isinstance(found, str) and value.strip() == value and not (literal and (found != value or "${" in value)):
        return value
    return _quoted(value, literal=literal)


def _list(value: str, *, sweep: bool, or_text: bool) -> str:
    """A list of texts, quoted; a single text needs no brackets."""
    try:
        found = _parsed(value)
    except ValueError:
        found = value
    if isinstance(found, list) or found is None:
        return value
    if hasattr(found, "is_sweep_override") and sweep:
        return value
    if not (value.startswith("[") and value.endswith("]")):
        one = value if isinstance(found, QuotedString) else _quoted(value, literal=False)
        return one if or_text else f"[{one}]"
    elements = [element.strip() for element in _ELEMENT.findall(value[1:-1] + ",")]
    return f"[{','.join(e if _is_quoted(e) else _quoted(e, literal=False) for e in elements)}]"


def _is_quoted(element: str) -> bool:
    try:
        return isinstance(_parsed(element), QuotedString)
    except ValueError:
        return False
