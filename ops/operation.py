"""How an operation and its implementations are declared, beside their code; ops/registry.py chooses among them."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from ops.autotune import Memory
from ops.run_context import RunContext

T = TypeVar("T")


OPTIONAL_PACKAGES = ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda", "deep_ep", "triton")
"""Which implementations call, and a run does without."""


class Unavailable(Exception):
    """Says what keeps an implementation from running here, in words that follow its name."""


def is_absent(error: Exception) -> bool:
    """Whether an import failed because an optional package is not installed. One that is there and broken, of a version
    without what is imported, or without a package that it needs itself, is not absent."""
    name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    package, loaded = name.partition(".")[0], cast("dict[str, object]", sys.modules)
    # None among the modules: its import is forbidden.
    return package in OPTIONAL_PACKAGES and (name == package or loaded.get(package, package) is None)


def brief(error: Exception) -> str:
    """The kind of an error, and the first line of its message."""
    lines = str(error).splitlines()
    return type(error).__name__ + (f": {lines[0][:100]}" if lines else "")


@dataclass(frozen=True)
class Implementation(Generic[T]):
    """One way to compute an operation."""

    name: str
    load: str | Callable[[RunContext], T]
    """`module:attribute`, imported when it is first tried, or a function that returns the implementation. It may raise
    anything: an ImportError that `is_absent` where a package is not installed, Unavailable with a reason."""
    why: str = ""
    """For the start table, instead of how close it comes to the reference."""
    device: str | None = None
    """cuda or cpu; None: any."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of weights and activations; empty: any."""
    is_supported: Callable[[RunContext], bool] = lambda context: True
    """Whether it is meant for such a machine and run. What is not is passed over without a word."""
    unsupported_reason: Callable[[RunContext], str | None] = lambda context: None
    """What keeps it from this run, in words that follow its name; None: nothing."""
    is_default: Callable[[RunContext], bool] = lambda context: True
    """Whether it is taken by its place in the order; otherwise it has to be measured or asked for."""
    label: str = ""
    """Its name in messages where that is another one."""

    def __str__(self) -> str:
        return self.label or self.name

    def mismatch(self, context: RunContext) -> str | None:
        """How precision or device differ from what it is for."""
        if self.dtypes and context.dtype not in self.dtypes:
            return f"computes in bf16, this run in {context.dtype}"
        if self.device in (None, context.device.type):
            return None
        here = "a CPU" if context.device.type == "cpu" else "a GPU"
        return f"{'needs a GPU' if self.device == 'cuda' else 'is for a CPU'}, and this run is on {here}"

    def loaded(self, context: RunContext) -> T:
        if callable(self.load):
            return self.load(context)
        module, _, attribute = self.load.partition(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Row:
    """A row of the start table."""

    operation: str
    name: str
    why: str
    refused: bool = False
    """Whether something faster was found here and left out."""


@dataclass
class Operation(Generic[T]):
    """What the layers call, in implementations of one signature."""

    field: str
    """Of ops.implementations.Ops."""
    name: str
    """Of its row in the start table."""
    reference: Callable[[RunContext], Implementation[T]]
    """What the others have to reproduce, and what runs where none does."""
    implementations: list[Implementation[T]]
    """In order of preference."""
    trial: Callable[[T, RunContext], Sequence[Tensor]]
    """Results and gradients on a small random batch, the same for every implementation."""
    tolerance: Mapping[torch.dtype, float]
    """The largest relative difference, by norm, that rounding explains."""
    is_used: Callable[[RunContext], bool] = lambda context: True
    """Whether any layer of the run calls it."""
    setting: str = ""
    """The key that can ask for an implementation by name."""
    asked: Callable[[RunContext], str] = lambda context: "auto"
    """The name that is asked for where no key names one; auto: none."""
    refusal: str = ""
    """The message where that one cannot run: of its {name} and the {reason}, or a {note} that begins with its label."""
    must_run: Callable[[RunContext], bool] = lambda context: False
    """Whether a run without any of the implementations is refused."""
    is_collective: bool = False
    """Whether a trial sends messages: ranks agree that all have loaded an implementation before they try it."""
    tune: Callable[[Mapping[str, T], tuple[str, str], RunContext, Memory], tuple[str, str, bool]] | None = None
    """Measures those that pass the trial: (by name, (default, why), ...) -> (name, why, whether one failed)."""
    describe: Callable[[RunContext, Row], Row] = lambda context, row: row
    """Its row, with what else the start table is to say."""
    standard: str = "torch's"
    """The reference in messages; empty: its name."""

    def wanted(self, context: RunContext) -> str:
        """The value of its setting."""
        if not self.setting:
            return self.asked(context)
        value: Any = context.config
        for part in self.setting.split("."):
            value = getattr(value, part)
        return value
