"""The door that the commands share: Hydra reads the settings, mistakes in them end in one line and exit code 2.

Imports nothing heavy, so that a mistake is answered within the first second, on a login node too."""

import contextlib
import dataclasses
import difflib
import functools
import os
import re
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from launch import process
from parallel import device_env, threads
from training.noise import discard_output

CONF = Path(__file__).resolve().parent.parent / "conf"
FAILED, BAD_CONFIGURATION = 1, 2
CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}


def command(schema: type, config_name: str, run: Callable[[Any], int]) -> None:
    """Runs a command and ends the process.

    schema: the dataclass of its settings; conf/<config_name>.yaml lists it first in its defaults, as `schema`.
    run: gets an instance of schema; returns the exit code. A ValueError that it raises is the user's to mend.

    Exit code: what run returned (of several runs with --multirun, the first that is not 0); 2 and one message on
    stderr for a configuration error or a ValueError; 1 and one message for a file, or standard output, that cannot be
    read or written; 1 and a traceback for any other exception.
    """
    threads.wait_briefly()
    device_env.set_device_variables()
    ConfigStore.instance().store(name="schema", node=schema)
    keys = setting_types(schema)
    exit_codes: list[int] = []

    def fail(error: Exception, code: int = BAD_CONFIGURATION) -> None:
        exit_codes.append(code)
        if not isinstance(error, BrokenPipeError):  # the reader of standard output has seen enough
            with contextlib.suppress(OSError):  # nobody reads standard error either
                print(f"switchyard: error: {explain(error, keys)}", file=sys.stderr)

    @functools.wraps(run)  # Hydra takes the command's name, shown by --help, from the wrapped function's module
    def task(config: DictConfig) -> None:
        # Caught here and not outside of Hydra, so that the other runs of --multirun go on.
        try:
            exit_codes.append(run(OmegaConf.to_object(config)))
        except CONFIGURATION_ERRORS as error:
            fail(error)
        except OSError as error:
            fail(error, FAILED)
            try:
                sys.stdout.flush()
            except OSError:
                discard_output(sys.stdout)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing its own message and exiting with 1
    try:
        process.prepare()
        check_arguments(sys.argv[1:], keys)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
    except CONFIGURATION_ERRORS as error:
        fail(error)
    sys.exit(next((code for code in exit_codes if code != 0), 0))


def setting_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """The dotted path of every setting and section of a dataclass, with its type."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found |= setting_types(hint, f"{prefix}{name}.")
    return found


def check_arguments(arguments: list[str], keys: dict[str, Any]) -> None:
    """Raises ValueError for what Hydra would accept (`+unknown=1`) or reject without naming what works."""
    options, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        hint = "settings are given as key=value, without dashes" if unknown[0].startswith("-") else "put options first"
        raise ValueError(f"{unknown[0]} is not understood here: {hint}; --help shows what there is")
    groups = {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")}
    for override in OverridesParser.create().parse_overrides(options.overrides):
        check_override(override, keys, groups)


def check_override(override: Override, keys: dict[str, Any], groups: set[str]) -> None:
    """Raises ValueError where the setting or preset group does not exist or is added or removed as if it did not."""
    key = override.key_or_group
    if re.match(r"hydra\b", key):
        return
    if key not in keys and key not in groups:
        raise ValueError(f"there is no setting {key}; {nearest_settings(key, [*keys, *sorted(groups)])}")
    if override.is_delete():
        raise ValueError(f"{override.input_line}: {key} cannot be removed, only set: {key}=VALUE")
    if override.is_add() and key in keys and key not in groups:
        raise ValueError(f"{override.input_line}: {key} exists already; drop the +")


def nearest_settings(key: str, known: Iterable[str]) -> str:
    """Says what was probably meant: `lr` -> optim.lr, `model.moe.topk` -> model.moe.top_k."""
    known = list(dict.fromkeys(known))
    section, _, name = key.rpartition(".")

    def similarity(one: str, other: str) -> float:
        part = len(one) > 2 and one in other.split("_")  # heads -> num_attention_heads
        return max(difflib.SequenceMatcher(None, one, other).ratio(), 0.85 * part)

    # The last part says what is meant; the path before it decides between equals.
    ranked = sorted(known, key=lambda k: (similarity(name, k.rpartition(".")[2]), similarity(key, k)), reverse=True)
    same_name = [candidate for candidate in ranked if candidate.rpartition(".")[2] == name]
    if same_name:
        return f"did you mean {' or '.join(same_name)}?"
    if similarity(name, ranked[0].rpartition(".")[2]) >= 0.7:
        return f"the nearest is {ranked[0]}"
    beside = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    return f"there are {', '.join(beside)}" if beside else "--help lists all"


def explain(error: BaseException, keys: dict[str, Any]) -> str:
    """What is wrong, and what would work, for an error of Hydra, OmegaConf, YAML or a command."""
    cause: BaseException = error
    prefix = ""
    if isinstance(error, HydraException):
        # Hydra says in which file, OmegaConf what is wrong there.
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
                "Text with special characters needs quotes of its own: \"key='...'\""
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
            return str(cause).split("\n\n")[0].strip()  # what follows is Hydra's search path
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip() or type(error).__name__


def fields_of_owner(error: OmegaConfBaseException) -> dict[str, Any]:
    """The settings of a list element such as {weight: 1} of data.blend, whose path OmegaConf does not give."""
    owner = error.object_type
    known = isinstance(owner, type) and dataclasses.is_dataclass(owner) and error.full_key == error.key
    return setting_types(owner) if known else {}


def explain_unknown_key(error: OmegaConfBaseException, keys: dict[str, Any]) -> str:
    """For a key in a file or inside a value: data.blend=[{weigth: 1}]."""
    key = error.full_key or str(error.key)
    fields = fields_of_owner(error)
    place = f" in a {error.object_type.__name__}" if fields and error.object_type else ""
    return f"there is no setting {key}{place}; {nearest_settings(key, fields or keys)}"


def explain_type(error: ValidationError, keys: dict[str, Any]) -> str:
    """For a value of the wrong type."""
    key = re.sub(r"\[\d+\]", "", error.full_key or str(error.key))
    hint = (keys | fields_of_owner(error)).get(key)
    if hint is None:
        return f"{key}: {str(error).splitlines()[0]}"
    value = "null" if error.value is None else error.value
    if dataclasses.is_dataclass(hint):
        inside = [name for name in keys if name.startswith(f"{key}.")]
        return f"{key}={value}: {key} is a section, not a setting; it holds {', '.join(inside)}"
    example = f", for example {key}=[{value}]" if hint == list[str] and isinstance(value, str) else ""
    return f"{key}={value}: {key} must be {type_name(hint)}{example}"


def type_name(hint: Any) -> str:
    """A type in words: `list[int] | None` -> 'a list (each: a whole number) or null'."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(type_name(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list (each: {type_name(get_args(hint)[0])})"
    if hint is types.NoneType:
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(f'{name}: ...' for name in setting_types(hint))}}}"
    return TYPE_NAMES[hint]
