"""What is called of Hydra although its name is private: nothing public gives the same."""

import argparse
from collections.abc import Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(Hydra's options and `overrides`, what it does not know) of a command line."""
    return get_args_parser().parse_known_args(list(arguments))


def unconverted_value(override: Override) -> Any:
    """The value of an override as it was parsed: Override.value() takes the quotes off."""
    return override._value
