"""Stands for transformer_engine.common.recipe."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple


class _Largest(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    E4M3 = _Largest(448, 448)
    HYBRID = _Largest(448, 57344)


class Recipe:
    pass


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    reduce_amax: bool = True


@dataclass
class Float8CurrentScaling(Recipe):
    fp8_format: Format = Format.HYBRID


@dataclass
class MXFP8BlockScaling(Recipe):
    fp8_format: Format = Format.E4M3


@dataclass
class Float8BlockScaling(Recipe):
    fp8_format: Format = Format.E4M3
