"""Private functions of Hydra that have no public equivalent."""

import argparse
from collections.abc import Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(Hydra's options with `overrides`, unknown arguments) of a command line."""
    return get_args_parser().parse_known_args(list(arguments))


def unconverted_value(override: Override) -> Any:
    """The parsed value of an override. Unlike Override.value(), it keeps the quotes."""
    return override._value
