"""Run directories that begin with weights of Hugging Face: what import and export share."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from training.run_dir import read_settings

BESIDE = "hf"
"""Folder of a run directory with the files that came beside the weights (models.hf.files)."""


@contextlib.contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A new directory beside `output` that gets its name when this is left without an exception; else it is removed.

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
    """The folder of files that came beside the weights of a run: its own, or that of the run that it was started from
    (checkpoint.load); None where it began at random."""
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
