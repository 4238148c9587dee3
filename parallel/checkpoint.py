"""Distributed checkpoints that open under every layout and are never half there.

A checkpoint holds, for every logical parameter, its fp32 weights and Adam's two moments in the parameter's own shape;
each element is written once, by the data-parallel rank that assembled it. Megatron-Core writes and reads the files and
proves that the boxes of all ranks tile every tensor. Its optimizer's own checkpoint formats are not used: without
TransformerEngine and Apex they fail or resume wrongly (one step counter shared by all parameters; docs/log.md).

A directory appears under its final name only when it is complete: written aside (parallel/checkpoint_writer.py), also
while training goes on, checked against the model, hashed into a manifest, renamed.
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import optimizer_state
from parallel.checkpoint_writer import Writing, digest
from parallel.engine import Engine
from parallel.placement import logical_name
from parallel.runtime import Runtime
from parallel.weight_matching import Mismatch, match_weights

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8})$")
_ABANDONED_AFTER = 3600.0
"""Seconds after which a half-written directory belongs to a process that is gone."""
_INDEX_BYTES = 2**20
"""Room that a checkpoint needs besides its tensors, generously."""


def step_directories(root: Path) -> list[Path]:
    """Checkpoints under a run's checkpoints directory, newest first; whole or not is not looked at."""
    found = [p for p in root.glob("step_*") if _STEP.match(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: p.name, reverse=True)


def read_manifest(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: {"state": the loop's counters, "files": {name: [bytes, digest]}}.

    Raises:
        ValueError: missing or unreadable.
    """
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is not a whole checkpoint: {MANIFEST}: {error}") from None


def _damage(directory: Path, names: list[str], files: dict[str, list[Any]]) -> str | None:
    """The first of the named files that is not what the manifest says."""
    for name in names:
        path, (size, wanted) = directory / name, files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if digest(path) != wanted:
            return f"{name} has changed since it was written"
    return None


def find_damage(directory: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing. With several ranks each reads a share; the caller
    brings the answers together."""
    try:
        files = read_manifest(directory)["files"]
    except ValueError as error:
        return str(error)
    return _damage(directory, sorted(files)[rank::ranks], files)


def newest_whole(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all intact, every rank reading a share. Damaged ones are reported."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    candidates: list[Any] = [step_directories(root) if rank == 0 else None]
    dist.broadcast_object_list(candidates)
    for directory in candidates[0]:
        answers: list[Any] = [None] * ranks
        dist.all_gather_object(answers, find_damage(directory, rank, ranks))
        damage = next(filter(None, answers), None)
        if damage is None:
            return directory
        warn(f"checkpoint {directory.name} is damaged ({damage}); trying the one before")
    return None


def resolve(path: str) -> Path:
    """A step's directory from a `checkpoint=` setting: that directory, or the newest whole one of a run directory.
    For commands of one rank.

    Raises:
        ValueError: there is none.
    """
    given = Path(path).expanduser()
    if _STEP.match(given.name):
        damage = find_damage(given)
        if damage:
            raise ValueError(f"checkpoint={path}: {damage}")
        return given
    root = given if given.name == "checkpoints" else given / "checkpoints"
    damaged = []
    for directory in step_directories(root):
        damage = find_damage(directory)
        if damage is None:
            return directory
        damaged.append(f"{directory.name}: {damage}")
    what = f"no whole one ({'; '.join(damaged)})" if damaged else "none"
    raise ValueError(f"checkpoint={path}: looked for {root}/step_NNNNNNNN and found {what}")


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every rank calls every method together."""

    def __init__(self, root: Path, engine: Engine, keep: int):
        self.root, self.engine, self.keep = root, engine, keep
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._under_way: tuple[Writing, Path, dict[str, Any]] | None = None
        self.stages = 0
        """Parts of saves that were begun; while it grows, a save gets on."""

    def save(self, state: dict[str, Any]) -> Path:
        """Writes a checkpoint; on return it is whole and the newest.

        Args:
            state: the loop's counters, JSON; state["step"] names the directory.

        Raises:
            ValueError: it could not be written (disk full, no permission). Earlier checkpoints are intact.
        """
        self.begin(state)
        path = self.settle(wait=True)
        assert path is not None
        return path

    def begin(self, state: dict[str, Any]) -> None:
        """Copies what a checkpoint holds and lets a thread write it; `settle` completes it. Arguments and errors as
        for `save`. One that was begun before has to be settled first."""
        assert self._under_way is None
        final = self.root / f"step_{state['step']:08d}"
        aside: list[Any] = [self.root / f".writing-{final.name}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(aside)
        with self._explained(final, aside[0]):
            self._together(lambda: self._make_aside(aside[0]) if self.rank == 0 else None)
            tensors = {**optimizer_state.to_save(self.engine), **_random_state(self.engine.runtime)}
            writing = self._together(lambda: Writing(tensors, aside[0]), keep=True)
            writing.start()
        self._under_way = writing, final, state

    def settle(self, *, wait: bool) -> Path | None:
        """Completes the checkpoint that was begun, and returns its directory; None where there is none or, unless
        `wait`, where a rank is still writing.

        Raises:
            ValueError: as `save`.
        """
        if self._under_way is None:
            return None
        writing, final, state = self._under_way
        if not wait:
            over = torch.tensor([writing.is_over()], dtype=torch.int32, device=self.engine.runtime.device)
            dist.all_reduce(over, op=dist.ReduceOp.MIN)
            if not over.item():
                return None
        self._under_way = None
        with self._explained(final, writing.aside):
            self._together(writing.finish_files)
            self._together(writing.complete)
            shapes = self._together(lambda: optimizer_state.expected_shapes(self.engine))
            hashed = self._together(lambda: writing.hashed)
            publish = partial(self._publish, writing.aside, final, state, shapes, hashed)
            self._together(publish if self.rank == 0 else lambda: None)
        if self.rank == 0:
            self._prune()
        return final

    @contextlib.contextmanager
    def _explained(self, final: Path, aside: Path) -> Iterator[None]:
        """An error of the storage, the same on all ranks, with what a person should know of it."""
        try:
            yield
        except ValueError as error:
            room = _free_space(self.root)
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise ValueError(
                f"could not write checkpoint {final}: {error}{room}. Earlier checkpoints are intact"
            ) from None

    def _together(self, action: Callable[[], Any], *, keep: bool = False) -> Any:
        """Every rank's result of an action, or with `keep` this rank's alone; when storage fails one rank, all fail
        with that rank's message."""
        result, error = None, None
        self.stages += 1
        try:
            result = action()
        except BaseException as raised:  # torch's CheckpointException is no Exception
            if not _is_storage_error(raised):
                raise
            error = str(raised).strip().splitlines()[-1]
        answers: list[Any] = [None] * self.ranks
        dist.all_gather_object(answers, (None if keep else result, error))
        if any(failed for _, failed in answers):
            raise ValueError(next(failed for _, failed in answers if failed))
        return result if keep else [answer for answer, _ in answers]

    def _make_aside(self, aside: Path) -> None:
        aside.mkdir(parents=True)
        # Megatron-Core's index files are written by rank 0 alone, and the others would wait for it in vain: a disk
        # that is full has to show here.
        with (aside / ".trial").open("wb") as file:
            file.write(bytes(_INDEX_BYTES))
            file.flush()
            os.fsync(file.fileno())
        (aside / ".trial").unlink()

    def _publish(
        self,
        aside: Path,
        final: Path,
        state: dict[str, Any],
        shapes: list[dict[str, tuple[int, ...]]],
        hashed: list[dict[str, list[Any]]],
    ) -> None:
        """Checks that every logical element of the model is there, adds the manifest and gives the final name."""
        expected = {name: shape for part in shapes for name, shape in part.items()}
        written = stored_shapes(aside)
        for key, shape in expected.items():
            assert written.get(key) == shape, f"{key}: {written.get(key)}"
        files = {name: entry for part in hashed for name, entry in part.items()}
        with (aside / MANIFEST).open("w") as file:
            json.dump({"state": state, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.is_dir():
            # The same step was saved before; if that one is damaged, make way for the new one.
            if find_damage(final) is None:
                shutil.rmtree(aside)
                return
            shutil.rmtree(final)
        try:
            os.rename(aside, final)
        except OSError:  # a process that should be gone has published the same step in between
            if not final.is_dir() or find_damage(final) is not None:
                raise
            shutil.rmtree(aside)

    def _prune(self) -> None:
        for directory in step_directories(self.root)[self.keep :]:
            shutil.rmtree(directory, ignore_errors=True)
        for leftover in self.root.glob(".writing-*"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(leftover, ignore_errors=True)

    def load(self, directory: Path) -> dict[str, Any]:
        """Restores weights, moments and, in a world of the same size, the generators. Returns the saved state."""
        from megatron.core import dist_checkpointing

        state = read_manifest(directory)["state"]
        load_weights(self.engine, directory)
        wanted: dict[str, Any] = optimizer_state.to_load(self.engine)
        same_world = state["world_size"] == self.ranks
        if same_world:
            wanted |= _random_state(self.engine.runtime)
        # Not every rank asks for every box, so the ranks' requests need not tile the tensors.
        loaded = dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False)
        optimizer_state.restore(self.engine, loaded, updates=state["updates"])
        if same_world:
            _restore_random(loaded["random"])
        return state


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The logical shape of every tensor in a checkpoint whose elements are all there."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    index = FileSystemReader(directory).read_metadata()
    found = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            boxes = [c.sizes for c in entry.chunks if MetadataIndex(key, c.offsets) in index.storage_data]
            if sum(map(math.prod, boxes)) == math.prod(entry.size):
                found[key] = tuple(entry.size)
    return found


def load_weights(engine: Engine, directory: Path, *, partial: bool = False) -> Mismatch:
    """Reads the weights alone into the model (and the optimizer's master copies, if there is one), and accounts for
    every one of either side. State that follows a rule starts naturally where the checkpoint has none.

    Args:
        partial: what only one side has, or has in another shape, is left as it is.

    Raises:
        ValueError: the checkpoint is of another model, or has nothing in common with this one.
    """
    from megatron.core import dist_checkpointing

    mismatch, matching = match_weights(engine, stored_shapes(directory))
    if mismatch and not partial:
        raise ValueError(f"{directory} is of another model: {mismatch}")
    if not matching:
        raise ValueError(f"{directory} has no weight in common with this model: {mismatch}")
    wanted = {key: box for key, box in optimizer_state.weights_to_load(engine).items() if key in matching}
    # Not every rank asks for every box, so the ranks' requests need not tile the tensors.
    loaded = dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False)
    with torch.no_grad():
        for module in engine.modules:
            for name, parameter in module.named_parameters():
                if (key := f"weights.{logical_name(name, parameter)}") in loaded:
                    parameter.copy_(loaded[key])
    optimizer_state.restore_master(engine, loaded)
    return mismatch


def _random_state(runtime: Runtime) -> dict[str, Any]:
    """Every generator of this rank. The model draws nothing from them; a library that a user adds may."""
    import random

    import numpy as np
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    rank, ranks = runtime.world.rank, runtime.world.size
    return {"random": ShardedObject("random", states, (ranks,), (rank,))}


def _restore_random(states: dict[str, Any]) -> None:
    import random

    import numpy as np
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def _is_storage_error(error: BaseException) -> bool:
    from torch.distributed.checkpoint.api import CheckpointException

    # A writer that fails is a process of its own: its OSError comes back as text, inside a CheckpointException that
    # all ranks raise. What went wrong, only rank 0 is told.
    return isinstance(error, OSError | CheckpointException)


def _free_space(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:,.0f} MiB free when it failed)"
    except OSError:  # the place itself is what is wrong
        return ""
