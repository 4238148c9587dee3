"""Turns errors of Hydra, OmegaConf and YAML into one message each."""

import dataclasses
import difflib
import re
import types
from typing import Any, get_args, get_origin

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from launch.settings import nearest_settings, setting_types

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "any value"}


def explain(error: BaseException, keys: dict[str, Any]) -> str:
    """The message for an error of Hydra, OmegaConf, YAML or a command: what is wrong and what would work."""
    cause: BaseException = error
    prefix = ""
    if isinstance(error, HydraException):
        # Hydra's error has the file, OmegaConf's the problem.
        inner = error.__cause__ or error.__context__
        if isinstance(inner, OmegaConfBaseException):
            cause = inner
        where = re.match(r"In '(.+?)': \w+ raised", str(error))
        prefix = f"in {where[1]}.yaml: " if where else ""
    match cause:
        case OverrideParseException() if "=" not in cause.override:
            return f"{cause.override} is not a setting: settings are given as key=value"
        case OverrideParseException():
            return (
                f"cannot read {cause.override}: {cause.message.splitlines()[0]}. "
                "Text with special characters needs its own quotes: \"key='...'\""
            )
        case MissingConfigException() if cause.options and cause.missing_cfg_file:
            group, _, option = cause.missing_cfg_file.rpartition("/")
            nearest = difflib.get_close_matches(option, cause.options, n=1, cutoff=0.0)
            return f"there is no {group}={option}; the nearest is {group}={nearest[0]} of {', '.join(cause.options)}"
        case MissingMandatoryValue():
            return f"{prefix}{cause.full_key} must be given: {cause.full_key}=VALUE"
        case ConfigKeyError() | ConfigAttributeError():
            return f"{prefix}{explain_unknown_key(cause, keys)}"
        case ValidationError():
            return f"{prefix}{explain_type(cause, keys)}"
        case OmegaConfBaseException():
            return f"{prefix}{cause.full_key or 'settings'}: {str(cause).splitlines()[0]}"
        case HydraException():
            return str(cause).split("\n\n")[0].strip()  # followed by Hydra's search path
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip() or type(error).__name__


def fields_of_owner(error: OmegaConfBaseException) -> dict[str, Any]:
    """The settings of a list element such as {weight: 1} in data.blend, for which OmegaConf does not give a path."""
    owner = error.object_type
    known = isinstance(owner, type) and dataclasses.is_dataclass(owner) and error.full_key == error.key
    return setting_types(owner) if known else {}


def explain_unknown_key(error: OmegaConfBaseException, keys: dict[str, Any]) -> str:
    """The message for an unknown key in a file or in a value: data.blend=[{weigth: 1}]."""
    key = error.full_key or str(error.key)
    fields = fields_of_owner(error)
    place = f" in a {error.object_type.__name__}" if fields and error.object_type else ""
    return f"there is no setting {key}{place}; {nearest_settings(key, fields or keys)}"


def explain_type(error: ValidationError, keys: dict[str, Any]) -> str:
    """The message for a value of the wrong type."""
    key = re.sub(r"\[\d+\]", "", error.full_key or str(error.key))
    hint = (keys | fields_of_owner(error)).get(key)
    if hint is None:
        return f"{key}: {str(error).splitlines()[0]}"
    value = "null" if error.value is None else error.value
    if dataclasses.is_dataclass(hint):
        inside = [name for name in keys if name.startswith(f"{key}.")]
        return f"{key}={value}: {key} is a section, not a setting; it contains {', '.join(inside)}"
    example = f", for example {key}=[{value}]" if hint == list[str] and isinstance(value, str) else ""
    return f"{key}={value}: {key} must be {type_name(hint)}{example}"


def type_name(hint: Any) -> str:
    """A type in words: `list[int] | None` -> 'a list (each: an integer) or null'."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(type_name(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list (each: {type_name(get_args(hint)[0])})"
    if hint is types.NoneType:
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(f'{name}: ...' for name in setting_types(hint))}}}"
    return TYPE_NAMES[hint]
