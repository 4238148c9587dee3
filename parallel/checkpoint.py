"""Distributed checkpoints that open under every layout and are never half there.

A checkpoint holds, for every logical parameter, its fp32 weights and Adam's two moments in the parameter's own shape.
Each element is written once, by the data-parallel rank that assembled it, into that rank's safetensors file. Nothing is
pickled, so reading a checkpoint runs no code. Why not Megatron-Core's formats: docs/log.md. A directory appears under
its final name only when it is complete: written aside (parallel/checkpoint_writer.py), checked against the model,
hashed into a manifest (parallel/checkpoint_manifest.py), renamed.
"""

import contextlib
import os
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
from parallel.checkpoint_format import CheckpointDamaged, StoredTensor, read_tensors
from parallel.checkpoint_manifest import (
    MANIFEST,
    UPDATES,
    UnsupportedVersion,
    find_damage,
    incomplete,
    read_manifest,
    read_manifest_together,
    resolve,
    run_to_completion,
    set_aside,
    step_directories,
    verify,
    write_manifest,
)
from parallel.checkpoint_writer import CheckpointWriter
from parallel.engine import Engine
from parallel.progress_sync import ProgressSync
from parallel.random_state import dtype_of, random_state, restore_random_state
from parallel.sharding import logical_name
from parallel.weight_matching import Mismatch, match_weights

__all__ = [
    "MANIFEST",
    "Checkpointer",
    "NonFiniteState",
    "find_damage",
    "load_weights",
    "read_manifest",
    "resolve",
    "step_directories",
    "stored_shapes",
]
_ABANDONED_AFTER = 3600.0
"""Seconds after which a half-written directory belongs to a process that is gone."""


class NonFiniteState(RuntimeError):
    """Weights or moments hold a NaN or an infinity: there is nothing worth keeping."""


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every rank calls every method together."""

    def __init__(self, root: Path, engine: Engine, keep: int):
        self.root, self.engine, self.keep = root, engine, keep
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._pending_save: tuple[CheckpointWriter, Path, dict[str, Any]] | None = None
        self.stages = 0
        """Parts of saves and loads that were begun; while it grows, they get on."""
        self.progress_sync = ProgressSync(engine.runtime.device, self._progress)
        self.last_good: Path | None = None
        """The newest whole checkpoint of this run that is known: restored, or written since."""

    def _progress(self) -> None:
        self.stages += 1

    def resume(self, warn: Callable[[str], None], *, fresh: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """Restores the newest whole checkpoint. Damaged ones that are newer are reported and set aside under another
        name: they are never counted or looked at again.

        Args:
            fresh: where there are checkpoints and none is whole, set them aside and return None.

        Returns:
            (its directory, the saved state), or None where there is none.

        Raises:
            ValueError: none is whole, or the newest is of another model or another version.
        """
        damaged: list[tuple[Path, ValueError]] = []
        for directory in self.listing(self.root):
            wrong = self._verify(directory)
            if isinstance(wrong, UnsupportedVersion):
                raise wrong
            if wrong is None:
                try:
                    state = self.load(directory)
                    self._set_aside(damaged, warn)
                    self.last_good = directory
                    return directory, state
                except CheckpointDamaged as error:  # since it was hashed
                    wrong = error
            damaged.append((directory, wrong))
            warn(f"checkpoint {directory.name} is damaged ({wrong}); trying the one before")
        if damaged and not fresh:
            told = "; ".join(f"{directory.name}: {wrong}" for directory, wrong in damaged)
            raise ValueError(
                f"every checkpoint in {self.root} is damaged ({told}). Put a whole one back from a copy, choose "
                "another run.dir, or begin again at step 0 with checkpoint.resume=fresh, which sets these aside"
            )
        self._set_aside(damaged, warn)
        return None

    def resolve(self, path: str) -> Path:
        """A step's directory from a setting, as `checkpoint_manifest.resolve`; the ranks share the reading."""
        return resolve(path, lambda directory: (wrong := self._verify(directory)) and str(wrong), self.listing)

    def listing(self, root: Path) -> list[Path]:
        """Checkpoints in a directory as rank 0 sees it, newest first."""
        return self._together(lambda: step_directories(root) if self.rank == 0 else None)[0]

    def _verify(self, directory: Path) -> ValueError | None:
        """What is wrong with a checkpoint, the same on all ranks; each hashes a share of the files."""
        found = self.progress_sync.run(verify(directory, self.rank, self.ranks))
        return next((wrong for wrong in found if wrong is not None), None)

    def _set_aside(self, damaged: list[tuple[Path, ValueError]], warn: Callable[[str], None]) -> None:
        for directory, _ in damaged:
            aside = self._together(lambda it=directory: set_aside(it).name if self.rank == 0 else None)[0]
            warn(f"{directory.name} is set aside as {aside}")

    def save(self, state: dict[str, Any]) -> Path:
        """Writes a checkpoint; on return it is whole and the newest.

        Args:
            state: the loop's counters, JSON; state["step"] names the directory.

        Raises:
            ValueError: it could not be written (disk full, no permission). Earlier checkpoints are intact.
            NonFiniteState: weights or moments are not finite. Nothing is written.
        """
        self.begin_save(state)
        path = self.finalize_save(wait=True)
        assert path is not None
        return path

    def begin_save(self, state: dict[str, Any]) -> None:
        """Copies what a checkpoint holds and starts the thread that writes it; `finalize_save` completes it. Arguments
        and errors as for `save`. A save that was begun before must have been finalized."""
        assert self._pending_save is None
        final = self.root / f"step_{state['step']:08d}"
        if bad := optimizer_state.first_nonfinite(self.engine):
            raise NonFiniteState(
                f"{final.name} is not written: {bad} is not finite. "
                f"The last good checkpoint is {self.last_good or 'none'}"
            )
        aside: list[Any] = [self.root / f".writing-{final.name}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(aside)
        with self._explained(final, aside[0]):
            self._together(lambda: aside[0].mkdir(parents=True) if self.rank == 0 else None)
            tensors = {**optimizer_state.to_save(self.engine), **self._random_to_save(), **self._updates_to_save(state)}
            writer = CheckpointWriter(tensors, aside[0], self.rank)
            writer.start()
        self._pending_save = writer, final, state

    def finalize_save(self, *, wait: bool) -> Path | None:
        """Completes the checkpoint that was begun, and returns its directory; None where there is none or, unless
        `wait`, where a rank is still writing.

        Raises:
            ValueError: as `save`.
        """
        if self._pending_save is None:
            return None
        writer, final, state = self._pending_save
        if not wait:
            over = torch.tensor([writer.is_done()], dtype=torch.int32, device=self.engine.runtime.device)
            dist.all_reduce(over, op=dist.ReduceOp.MIN)
            if not over.item():
                return None
        self._pending_save = None
        with self._explained(final, writer.aside):
            self.progress_sync.run(writer.wait())
            self._together(writer.finish_file)
            shapes = self._together(lambda: optimizer_state.expected_shapes(self.engine))
            hashed = self._together(lambda: writer.hashed)
            taken = self._together(final.is_dir)[0]
            wrong = self._verify(final) if taken else None
            publish = partial(self._publish, writer, final, state, shapes, hashed, replace=wrong is not None)
            self._together(publish if self.rank == 0 else lambda: None)
        self.last_good = final
        if self.rank == 0:
            self._prune(final)
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

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of an action; when storage fails one rank, all fail with that rank's message."""
        result, error = None, None
        self.stages += 1
        try:
            result = action()
        except (OSError, ValueError) as raised:
            error = str(raised).strip().splitlines()[-1]
        answers: list[Any] = [None] * self.ranks
        dist.all_gather_object(answers, (result, error))
        if any(failed for _, failed in answers):
            raise ValueError(next(failed for _, failed in answers if failed))
        return [answer for answer, _ in answers]

    def _updates_to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer counted, which the manifest is compared with when it is read."""
        from megatron.core.dist_checkpointing import ShardedTensor

        updates = max(self._together(lambda: optimizer_state.counted_updates(self.engine)))
        assert updates == state["updates"], (updates, state)
        return {UPDATES: ShardedTensor.from_rank_offsets(UPDATES, torch.tensor([updates]))} if self.rank == 0 else {}

    def _random_to_save(self) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        states = {f"{self._random}{name}": tensor for name, tensor in random_state().items()}
        return {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in states.items()}

    @property
    def _random(self) -> str:
        """Before the name of one of this rank's generators."""
        return f"random.{self.rank}."

    def _publish(
        self,
        writer: CheckpointWriter,
        final: Path,
        state: dict[str, Any],
        shapes: list[dict[str, tuple[int, ...]]],
        hashed: list[dict[str, list[Any]]],
        *,
        replace: bool,
    ) -> None:
        """Checks that every logical element of the model is there, adds the manifest and gives the final name.

        Args:
            replace: the step was saved before and is damaged.
        """
        aside = writer.aside
        lacking = incomplete({name: shape for part in shapes for name, shape in part.items()}, writer.stored)
        assert lacking is None, lacking
        write_manifest(aside, state, {name: entry for part in hashed for name, entry in part.items()}, writer.stored)
        if replace:
            set_aside(final)
        try:
            os.rename(aside, final)
        except OSError:  # the step was saved before, or a process that should be gone has published it in between
            if not final.is_dir() or find_damage(final) is not None:
                raise
            shutil.rmtree(aside)

    def _prune(self, newest: Path) -> None:
        """Deletes all but the newest checkpoints. Those of later steps are not of this line of the run; what is kept
        was restored whole or written since."""
        ours = [path for path in step_directories(self.root) if path.name <= newest.name]
        for directory in ours[self.keep :]:
            if directory.is_symlink():  # what it points to is somebody else's
                directory.unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
        for leftover in self.root.glob(".writing-*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(leftover, ignore_errors=True)

    def load(self, directory: Path) -> dict[str, Any]:
        """Restores weights, moments and, in a world of the same size, the generators. Returns the saved state.

        Raises:
            CheckpointDamaged: it cannot be read. Nothing was changed.
            ValueError: the checkpoint is of another model.
        """
        manifest = read_manifest_together(directory)
        state, stored = manifest["state"], manifest["tensors"]
        _, weights = _matching_weights(self.engine, directory, stored, partial=False)
        moments = optimizer_state.to_load(self.engine)
        self._together(lambda: _check_moments(moments, directory, stored))
        tensors = {key: (shard.data, tuple(shard.global_offset)) for key, shard in {**weights, **moments}.items()}
        random: dict[str, torch.Tensor] = {}
        if state["world_size"] == self.ranks:
            held = {key.removeprefix(self._random): t for key, t in stored.items() if key.startswith(self._random)}
            random = {name: torch.empty(t.shape, dtype=dtype_of(name)) for name, t in held.items()}
            tensors |= {f"{self._random}{name}": (t, (0,) * t.dim()) for name, t in random.items()}
        _read(directory, stored, tensors, self.progress_sync)
        loaded = {key: tensor for key, (tensor, _) in tensors.items()}
        _copy_weights(self.engine, loaded)
        optimizer_state.restore(self.engine, loaded, updates=state["updates"])
        if random:
            restore_random_state(random)
        return state


def _read(
    directory: Path,
    stored: dict[str, StoredTensor],
    tensors: dict[str, tuple[torch.Tensor, tuple[int, ...]]],
    progress_sync: ProgressSync | None,
) -> None:
    """Fills tensors from a checkpoint. Every rank calls this together; a failure on one rank is raised on all. With
    `progress_sync` a slow rank does not look stalled."""

    def read() -> Iterator[int]:
        try:
            yield from read_tensors(directory, stored, tensors)
        except CheckpointDamaged as error:
            return error
        return None

    found: list[CheckpointDamaged | None] = [None] * dist.get_world_size()
    if progress_sync:
        found = progress_sync.run(read())
    else:
        dist.all_gather_object(found, run_to_completion(read()))
    if wrong := next((error for error in found if error is not None), None):
        raise wrong


def _check_moments(wanted: dict[str, Any], directory: Path, stored: dict[str, StoredTensor]) -> None:
    if wanted and not any(key.startswith(f"{kind}.") for key in stored for kind in optimizer_state.MOMENTS):
        raise ValueError(
            f"{directory} holds weights alone, as launch.import_hf writes them: start another run from it, with "
            f"checkpoint.load={directory.parent.parent}"
        )
    for key, shard in wanted.items():
        if key not in stored or stored[key].shape != tuple(shard.global_shape):
            raise ValueError(f"{directory} is of another model: it has no {key} of shape {tuple(shard.global_shape)}")


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The logical shape of every tensor in a checkpoint whose elements are all there."""
    return {name: tensor.shape for name, tensor in read_manifest(directory)["tensors"].items() if tensor.is_complete()}


def _matching_weights(
    engine: Engine, directory: Path, stored: dict[str, StoredTensor], *, partial: bool
) -> tuple[Mismatch, dict[str, Any]]:
    """(what does not match, boxes to read)."""
    shapes = {name: tensor.shape for name, tensor in stored.items() if tensor.is_complete()}
    mismatch, matching = match_weights(engine, shapes)
    if mismatch and not partial:
        raise ValueError(f"{directory} is of another model: {mismatch}")
    if not matching:
        raise ValueError(f"{directory} has no weight in common with this model: {mismatch}")
    return mismatch, {key: shard for key, shard in optimizer_state.weights_to_load(engine).items() if key in matching}


def load_weights(
    engine: Engine, directory: Path, *, partial: bool = False, progress_sync: ProgressSync | None = None
) -> Mismatch:
    """Reads the weights alone into the model (and the optimizer's master copies, if there is one), and accounts for
    every one of either side. State that follows a rule starts naturally where the checkpoint has none.

    Args:
        partial: what only one side has, or has in another shape, is left as it is.
        rounds: keeps the ranks of a training run together while they read.

    Raises:
        ValueError: the checkpoint is of another model, has nothing in common with this one, or cannot be read.
    """
    stored = read_manifest_together(directory)["tensors"]
    mismatch, wanted = _matching_weights(engine, directory, stored, partial=partial)
    _read(
        directory,
        stored,
        {key: (shard.data, tuple(shard.global_offset)) for key, shard in wanted.items()},
        progress_sync,
    )
    _copy_weights(engine, {key: shard.data for key, shard in wanted.items()})
    return mismatch


def _copy_weights(engine: Engine, loaded: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for module in engine.modules:
            for name, parameter in module.named_parameters():
                if (key := f"weights.{logical_name(name, parameter)}") in loaded:
                    parameter.copy_(loaded[key])
    optimizer_state.restore_master(engine, loaded)


def _free_space(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:,.0f} MiB free when it failed)"
    except OSError:  # the place itself is what is wrong
        return ""
