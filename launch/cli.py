"""Runs a command: Hydra composes the settings, and errors in them end in one message and exit code 2.

Imports nothing heavy, so that errors are reported within a second, on a login node too."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.extensions import import_extensions
from conf.printable import visible
from launch import help_text, process
from launch.explain import explain
from launch.overrides import CONF, checked_arguments
from launch.settings import setting_types
from parallel import device_env, threads
from training.output_redirect import discard_output

FAILED, BAD_CONFIGURATION = 1, 2
CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)


def command(
    schema: type,
    config_name: str,
    run: Callable[[Any], int],
    arguments: Callable[[Sequence[str]], list[str]] = list,
) -> None:
    """Runs a command and exits the process.

    Exit code: the return value of `run` (with --multirun, the first one that is not 0); 2 and one message on stderr for
    a configuration error or a ValueError; 1 and one message if a file, or standard output, cannot be read or written; 1
    and a traceback for any other exception.

    Args:
        schema: the dataclass of the settings; conf/<config_name>.yaml lists it first in its defaults, as `schema`.
        config_name: Hydra's primary config.
        run: takes an instance of schema and returns the exit code. It raises ValueError for errors of the user.
        arguments: the command line as overrides, where a command takes other words than these.
    """
    threads.limit_spinning()
    device_env.set_device_variables()
    ConfigStore.instance().store(name="schema", node=schema)
    keys = setting_types(schema)
    exit_codes: list[int] = []

    def fail(error: Exception) -> None:
        # Configuration errors first: Hydra's error about a missing preset is an OSError too.
        exit_codes.append(BAD_CONFIGURATION if isinstance(error, CONFIGURATION_ERRORS) else FAILED)
        if not isinstance(error, BrokenPipeError):  # the reader of standard output has closed it
            with contextlib.suppress(OSError):  # standard error is closed too
                print(f"switchyard: error: {visible(explain(error, keys))}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            discard_output(sys.stdout)

    @functools.wraps(run)  # Hydra takes the command's name, shown by --help, from the wrapped function's module
    def task(config: DictConfig) -> None:
        # Caught here and not outside of Hydra, so that the other runs of --multirun continue.
        try:
            import_extensions(config.get("extensions", ()))
            exit_codes.append(run(OmegaConf.to_object(config)))
        except (*CONFIGURATION_ERRORS, OSError) as error:
            fail(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing its own message and exiting with 1
    try:
        process.prepare()
        if not help_text.answered(sys.argv[1:], schema, config_name, run):
            sys.argv[1:] = checked_arguments(arguments(sys.argv[1:]), keys)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
        sys.stdout.flush()  # at the exit of the interpreter, errors could not be handled
    except (*CONFIGURATION_ERRORS, OSError) as error:
        fail(error)
    sys.exit(next((code for code in exit_codes if code != 0), 0))
