"""Helpers shared by the import and export of Hugging Face models."""

import contextlib
import dataclasses
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import yaml

from conf.schema import Config
from training.run_dir import CONFIG, read_settings

STEP = "checkpoints/step_00000000"
"""The checkpoint of a run directory that a command makes."""
BESIDE = "hf"
"""Folder of a run directory with the files that came beside the weights (models.hf.files)."""
SINGLE_PROCESS = "start a single process, with NPROC=N to convert N files at a time and to verify on N simulated ranks"
_PRESETS = Path(__file__).parents[1] / "conf" / "model"


def model_name(output: Path, made: str) -> str:
    """The name of a model that is written to a run directory: the directory's, followed by `made` if a preset has that
    name."""
    name = re.sub(r"[^\w.-]", "_", output.absolute().name)
    return f"{name}_{made}" if (_PRESETS / f"{name}.yaml").exists() else name


def keep_settings(aside: Path, run: Config) -> None:
    """Writes config.yaml, and the model as a preset for --config-dir."""
    (aside / CONFIG).write_text(yaml.safe_dump(dataclasses.asdict(run), sort_keys=False))
    (aside / "model").mkdir()
    preset = yaml.safe_dump(dataclasses.asdict(run.model), sort_keys=False)
    (aside / "model" / f"{run.model.name}.yaml").write_text(f"# model={run.model.name} with --config-dir\n{preset}")


@contextlib.contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Context manager for a new temporary directory that is renamed to `output` on success and removed after an error.

    Raises:
        ValueError: `output` exists, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={output} exists: choose another, or remove it")
    aside = output.with_name(f".writing-{output.name}-{uuid.uuid4().hex[:8]}")
    try:
        try:
            aside.mkdir(parents=True)
            yield aside
            if output.is_dir():  # empty
                output.rmdir()
            aside.rename(output)
        except OSError as error:
            raise ValueError(f"output={output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def origin_of(run_dir: Path) -> Path | None:
    """The directory with the files that came with the weights of a run: its own, or that of the run that it was started
    from (checkpoint.load); None if it started from random weights."""
    seen: set[Path] = set()
    while run_dir not in seen:
        seen.add(run_dir)
        if (run_dir / BESIDE).is_dir():
            return run_dir / BESIDE
        load = (read_settings(run_dir).get("checkpoint") or {}).get("load")
        if not load:
            return None
        given = Path(load).expanduser().absolute()
        if given.name.startswith("step_"):
            given = given.parent
        run_dir = given.parent if given.name == "checkpoints" else given
        if not run_dir.is_dir():
            return None
    return None
