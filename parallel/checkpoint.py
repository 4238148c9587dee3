"""Saves and loads distributed checkpoints. A checkpoint can be loaded under every layout.

For every logical parameter a checkpoint holds the fp32 weights and Adam's two moments, in the parameter's own shape.
Each element is written once, by the data-parallel rank that assembled it, into that rank's safetensors file. Nothing is
pickled, so that loading a checkpoint runs no code. docs/log.md says why Megatron-Core's formats are not used.

Saving is atomic: the files are written to a temporary directory (parallel/checkpoint_writer.py), checked against the
model and hashed into a manifest (parallel/checkpoint_manifest.py); then the directory is renamed.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import optimizer_state
from parallel.checkpoint_format import CheckpointDamaged
from parallel.checkpoint_manifest import (
    MANIFEST,
    UPDATES,
    UnsupportedVersion,
    find_damage,
    incomplete,
    read_manifest,
    read_manifest_together,
    resolve,
    set_aside,
    step_directories,
    verify,
    write_manifest,
)
from parallel.checkpoint_writer import CheckpointWriter
from parallel.engine import Engine
from parallel.progress_sync import ProgressSync
from parallel.random_state import dtype_of, random_state, restore_random_state
from parallel.weight_loading import copy_weights, find_weights, read_together

__all__ = [
    "MANIFEST",
    "Checkpointer",
    "NonFiniteState",
    "find_damage",
    "read_manifest",
    "resolve",
    "step_directories",
]
_ABANDONED_AFTER = 3600.0
"""Seconds since the last change after which a temporary directory is deleted: its process has ended."""


class NonFiniteState(RuntimeError):
    """Weights or moments hold a NaN or an infinity, and no checkpoint is written."""


class Checkpointer:
    """Saves and loads the checkpoints of one run. Every rank calls every method together."""

    def __init__(self, root: Path, engine: Engine, keep: int):
        self.root, self.engine, self.keep = root, engine, keep
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._pending_save: tuple[CheckpointWriter, Path, dict[str, Any]] | None = None
        self.stages = 0
        """Counts the stages of saves and loads that have started: a sign of progress for the watchdog."""
        self.progress_sync = ProgressSync(engine.runtime.device, self._progress)
        self.base: dict[str, str] | None = None
        """Of adapters, what the manifest says of the weights that they are trained for."""
        self.last_good: Path | None = None
        """The newest complete checkpoint of this run: the one that was restored, or one saved since."""

    def _progress(self) -> None:
        self.stages += 1

    def resume(self, warn: Callable[[str], None], *, fresh: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """Restores the newest undamaged checkpoint. Newer ones, which are damaged, are reported and renamed, so that
        they are not considered again.

        Args:
            fresh: if all checkpoints are damaged, rename them and return None instead of raising.

        Returns:
            (its directory, the saved state), or None if there is no checkpoint.

        Raises:
            ValueError: all checkpoints are damaged, or the newest is of another model or another version.
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
                except CheckpointDamaged as error:  # after it was verified
                    wrong = error
            damaged.append((directory, wrong))
            warn(f"checkpoint {directory.name} is damaged ({wrong}); trying the one before")
        if damaged and not fresh:
            reasons = "; ".join(f"{directory.name}: {wrong}" for directory, wrong in damaged)
            raise ValueError(
                f"every checkpoint in {self.root} is damaged ({reasons}). Restore one from a backup, choose another "
                "run.dir, or start again at step 0 with checkpoint.resume=fresh, which renames the damaged ones"
            )
        self._set_aside(damaged, warn)
        return None

    def resolve(self, path: str) -> Path:
        """The checkpoint directory that a setting means, as `checkpoint_manifest.resolve`; the ranks share the
        reading."""
        return resolve(path, lambda directory: (wrong := self._verify(directory)) and str(wrong), self.listing)

    def listing(self, root: Path) -> list[Path]:
        """The checkpoints in a directory as rank 0 sees it, newest first."""
        return self._together(lambda: step_directories(root) if self.rank == 0 else None)[0]

    def _verify(self, directory: Path) -> ValueError | None:
        """What is wrong with a checkpoint, the same on all ranks; None: nothing. Each rank hashes a part of the
        files."""
        found = self.progress_sync.run(verify(directory, self.rank, self.ranks))
        return next((wrong for wrong in found if wrong is not None), None)

    def _set_aside(self, damaged: list[tuple[Path, ValueError]], warn: Callable[[str], None]) -> None:
        for directory, _ in damaged:
            aside = self._together(lambda it=directory: set_aside(it).name if self.rank == 0 else None)[0]
            warn(f"damaged checkpoint {directory.name} is renamed to {aside}")

    def save(self, state: dict[str, Any]) -> Path:
        """Saves a checkpoint. On return it is complete.

        Args:
            state: the training loop's counters, JSON; state["step"] names the directory.

        Raises:
            ValueError: it could not be written (disk full, no permission). Earlier checkpoints are intact.
            NonFiniteState: weights or moments are not finite. Nothing is written.
        """
        self.begin_save(state)
        path = self.finalize_save(wait=True)
        assert path is not None
        return path

    def begin_save(self, state: dict[str, Any]) -> None:
        """Copies the state to host memory and starts a thread that writes it; `finalize_save` completes the checkpoint.
        Arguments and errors are those of `save`. An earlier save must have been finalized."""
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
        """Completes the pending save and returns its directory.

        Args:
            wait: wait for all ranks; otherwise return None while a rank is still writing.

        Returns:
            None also if no save is pending.

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
    def _explained(self, final: Path, aside: Path) -> Generator[None]:
        """Adds context to a storage error, which is the same on all ranks."""
        try:
            yield
        except ValueError as error:
            free = _free_space(self.root)
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise ValueError(
                f"could not write checkpoint {final}: {error}{free}. Earlier checkpoints are intact"
            ) from None

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Runs an action on every rank and returns all results. If it raises OSError or ValueError on one rank, every
        rank raises ValueError with that rank's message."""
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
        """The optimizer's own count of updates, with which the manifest is compared when it is read."""
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
        """Prefix of the names of this rank's generators."""
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
        """Checks that every element of the model is stored, writes the manifest and renames the directory.

        Args:
            replace: the step was saved before and that checkpoint is damaged.
        """
        aside = writer.aside
        lacking = incomplete({name: shape for part in shapes for name, shape in part.items()}, writer.stored)
        assert lacking is None, lacking
        write_manifest(
            aside, state, {name: entry for part in hashed for name, entry in part.items()}, writer.stored, self.base
        )
        if replace:
            set_aside(final)
        try:
            os.rename(aside, final)
        except OSError:  # the step was saved before, or another process has published it in the meantime
            if not final.is_dir() or find_damage(final) is not None:
                raise
            shutil.rmtree(aside)

    def _prune(self, newest: Path) -> None:
        """Deletes all but the newest `keep` checkpoints up to `newest`. Checkpoints of later steps, which the run was
        not continued from, are left alone."""
        ours = [path for path in step_directories(self.root) if path.name <= newest.name]
        for directory in ours[self.keep :]:
            if directory.is_symlink():  # the target is not ours to delete
                directory.unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
        for leftover in self.root.glob(".writing-*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(leftover, ignore_errors=True)

    def load(self, directory: Path) -> dict[str, Any]:
        """Restores weights, moments and, if the world size is the same, the random number generators. Returns the saved
        state.

        Raises:
            CheckpointDamaged: it cannot be read. Nothing was changed.
            ValueError: the checkpoint is of another model.
        """
        manifest = read_manifest_together(directory)
        state, stored = manifest["state"], manifest["tensors"]
        if (manifest["base"] or {}).get("digest") != (self.base or {}).get("digest"):
            raise ValueError(f"{directory} holds adapters of {manifest['base']}, but the weights are {self.base}")
        _, weights = find_weights(self.engine, directory, stored, partial=False, only=self.engine.is_adapter)
        moments = optimizer_state.to_load(self.engine)
        self._together(lambda: optimizer_state.check_stored(self.engine, moments, directory, stored))
        tensors = {key: (shard.data, tuple(shard.global_offset)) for key, shard in {**weights, **moments}.items()}
        random: dict[str, torch.Tensor] = {}
        if state["world_size"] == self.ranks:
            held = {key.removeprefix(self._random): t for key, t in stored.items() if key.startswith(self._random)}
            random = {name: torch.empty(t.shape, dtype=dtype_of(name)) for name, t in held.items()}
            tensors |= {f"{self._random}{name}": (t, (0,) * t.dim()) for name, t in random.items()}
        read_together(directory, stored, tensors, self.progress_sync)
        loaded = {key: tensor for key, (tensor, _) in tensors.items()}
        copy_weights(self.engine, loaded)
        optimizer_state.restore(self.engine, loaded, updates=state["updates"])
        if random:
            restore_random_state(random)
        return state


def _free_space(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:,.0f} MiB free when it failed)"
    except OSError:  # the directory itself is the problem
        return ""
