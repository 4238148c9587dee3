"""Modules that a run imports for what they add to the extension points (CONTRIBUTING.md), and the names that are known
by them. Built-in names are known without importing anything."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from conf.model_schema import GATED_ACTIVATIONS

REGISTRIES = {
    "data.kind": ("corpus.sources", "SOURCES"),
    "model.activation": ("ops.activations", "ACTIVATIONS"),
    "model.moe.score_function": ("moe.score_functions", "SCORE_FUNCTIONS"),
    "logging.loggers": ("training.loggers", "LOGGERS"),
    "optim.name": ("parallel.optimizers", "OPTIMIZERS"),
    "optim.schedule": ("training.lr_schedule", "SCHEDULES"),
    "train.objective": ("models.objectives", "OBJECTIVES"),
}
"""Of each setting that an extension can add a value to: the module and its registry."""


def registered(setting: str) -> dict[str, Any]:
    """The entries of a setting's registry, built-in ones included. Empty where its module has not been imported: an
    extension imports it to add an entry."""
    if setting not in REGISTRIES:
        return {}
    module, registry = REGISTRIES[setting]
    return getattr(sys.modules.get(module), registry, {})


def input_projections(activation: str) -> int:
    """Of a feed-forward layer: two where the activation (ModelConfig.activation_name) is gated."""
    activation = activation.partition(":")[0]
    entry = registered("model.activation").get(activation)
    return 2 if (activation in GATED_ACTIVATIONS if entry is None else entry.gated) else 1


def takes_files(data_kind: str) -> bool:
    """Whether a data source reads data.files."""
    entry = registered("data.kind").get(data_kind)
    return data_kind in ("text", "megatron", "chat", "preference") if entry is None else entry.files is not None


def yields_documents(data_kind: str) -> bool:
    """Whether a data source gives text that is to be tokenised."""
    entry = registered("data.kind").get(data_kind)
    return data_kind not in ("megatron", "preference") if entry is None else entry.yields != "tokens"


def kept_tensors(optimizer: str, *, of_matrices: bool) -> int:
    """How many tensors of a parameter's size an optimizer keeps besides the weights.

    Args:
        of_matrices: of a hidden layer's matrices, not of other parameters.
    """
    entry = registered("optim.name").get(optimizer)
    if entry is None:
        return 1 if of_matrices and optimizer == "muon" else 2
    return len(entry.matrix_state if of_matrices and entry.matrix_state is not None else entry.state)


def missing_package(logger: str) -> str | None:
    """What a logger needs and is not installed."""
    entry = registered("logging.loggers").get(logger)
    package = {"wandb": "wandb", "mlflow": "mlflow"}.get(logger) if entry is None else entry.package
    return package if package and importlib.util.find_spec(package) is None else None


def schedule_reads(schedule: str, setting: str) -> bool:
    """Whether a learning-rate schedule uses optim.min_lr, or optim.decay_fraction."""
    entry = registered("optim.schedule").get(schedule)
    if entry is not None:
        return setting in entry.reads
    return schedule != "constant" if setting == "min_lr" else schedule == "wsd"


def import_extensions(modules: Sequence[str]) -> None:
    """Imports them, from the working directory too.

    Raises:
        ValueError: one cannot be imported.
    """
    for name in modules:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module does when it is imported
            raise ValueError(f"extensions: {name} cannot be imported: {_import_failure(name, error)}") from error


def _import_failure(name: str, error: Exception) -> str:
    """What is wrong with the module, at which of its lines; or where modules are looked for."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return (
            f"{error}; a module is named as in an import statement, and lies in the working directory or on PYTHONPATH"
        )
    lines = [
        f"{frame.f_code.co_filename}, line {line}: "
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == name
    ]
    return f"{lines[-1] if lines else ''}{type(error).__name__}: {error}"
