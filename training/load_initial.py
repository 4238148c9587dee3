"""Loads the weights that a run starts from (checkpoint.load)."""

from pathlib import Path

from conf.config_view import format_value
from parallel.checkpoint import Checkpointer
from parallel.weight_loading import load_weights
from training.adapters import as_base
from training.builder import BuiltModel
from training.console import Console


def load_initial_weights(built: BuiltModel, checkpointer: Checkpointer, console: Console) -> Path:
    """Every rank calls this together. For adapters, their checkpoints then name these weights. Returns the checkpoint.

    Raises:
        ValueError: the checkpoint is of another model, or cannot be read.
    """
    settings, is_adapter = built.config.checkpoint, built.engine.is_adapter
    assert settings.load is not None
    source, mismatch = checkpointer.load_from(
        settings.load,
        lambda directory: load_weights(
            built.engine,
            directory,
            partial=bool(settings.load_except),
            progress_sync=checkpointer.progress_sync,
            only=None if is_adapter is None else lambda name: not is_adapter(name),
        ),
    )
    if is_adapter is not None:
        checkpointer.base = as_base(source).as_json()
    console.note(f"weights from {source}")
    if mismatch:
        console.warning(f"checkpoint.load_except={format_value(settings.load_except)}: {mismatch}")
    return source
