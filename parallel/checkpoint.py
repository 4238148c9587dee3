"""Saves and loads distributed checkpoints. A checkpoint can be loaded under every layout.

For every logical parameter a checkpoint holds the fp32 weights and Adam's two moments, in the parameter's own shape.
Each element is written once, by the data-parallel rank that assembled it, into that rank's safetensors file. Nothing is
pickled, so that loading a checkpoint runs no code. docs/log.md says why Megatron-Core's formats are not used.

What is written where is planned and checked against the model once (parallel/checkpoint_plan.py). Saving is atomic: the
files are written to a temporary directory (parallel/checkpoint_writer.py), which hashes them, and listed in a manifest
(parallel/checkpoint_manifest.py); then the directory is renamed.
"""

import contextlib
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel import checkpoint_random, optimizer_state
from parallel.checkpoint_format import CheckpointDamaged, StoredTensor, TensorShard
from parallel.checkpoint_manifest import (
    MANIFEST,
    UPDATES,
    Loaded,
    Manifest,
    UnsupportedVersion,
    find_damage,
    read_manifest,
    read_manifest_together,
    resolve,
    resolve_and_load,
    set_aside,
    step_directories,
    verify,
    write_manifest,
)
from parallel.checkpoint_plan import file_of
from parallel.checkpoint_writer import CheckpointWriter
from parallel.engine import Engine
from parallel.first_found import first_found
from parallel.progress_sync import ProgressSync
from parallel.random_state import restore_random_state
from parallel.weight_loading import copy_weights, find_weights, read_once, read_together

__all__ = [
    "MANIFEST",
    "Checkpointer",
    "NonFiniteState",
    "find_damage",
    "read_manifest",
    "resolve",
    "step_directories",
]
T = TypeVar("T")
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
        self._writers: tuple[int, ...] = ()
        """The ranks that may write a file of the pending save."""
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
            wrong = self._verify(directory, but_tensors=True)  # these are verified when they are loaded
            if isinstance(wrong, UnsupportedVersion):
                raise wrong
            if wrong is None:
                try:
                    state = self.load(directory)
                    self._set_aside(damaged, warn)
                    self.last_good = directory
                    return directory, state
                except CheckpointDamaged as error:
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
        return resolve(path, self._damage, self.listing)

    def load_from(self, path: str, load: Callable[[Path], Loaded]) -> tuple[Path, Loaded]:
        """(directory, what `load` returned for it), as `checkpoint_manifest.resolve_and_load`."""
        return resolve_and_load(path, load, partial(self._damage, but_tensors=True), self.listing)

    def _damage(self, directory: Path, *, but_tensors: bool = False) -> str | None:
        wrong = self._verify(directory, but_tensors=but_tensors)
        return None if wrong is None else str(wrong)

    def listing(self, root: Path) -> list[Path]:
        """The checkpoints in a directory as rank 0 sees it, newest first."""
        return self._on_first(lambda: step_directories(root))

    def _verify(self, directory: Path, *, but_tensors: bool = False) -> ValueError | None:
        """What is wrong with a checkpoint, the same on all ranks; None: nothing. Each rank hashes a part of the
        files.

        Args:
            but_tensors: as `verify` takes it.
        """
        return self.progress_sync.run(verify(directory, self.rank, self.ranks, but_tensors=but_tensors))

    def _set_aside(self, damaged: list[tuple[Path, ValueError]], warn: Callable[[str], None]) -> None:
        for directory, _ in damaged:
            aside = self._on_first(lambda it=directory: set_aside(it).name)
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
        aside = self._on_first(lambda: self.root / f".writing-{final.name}-{uuid.uuid4().hex[:8]}")
        with self._explained(final, aside):
            self._on_first(lambda: aside.mkdir(parents=True))
            shards, plan = optimizer_state.to_save(self.engine), optimizer_state.save_plan(self.engine)
            plan.check(shards, self.engine.runtime.device)
            random, everywhere = checkpoint_random.to_save(self.engine.runtime)
            self._writers = tuple(range(self.ranks)) if everywhere else plan.writers
            tensors = {shard.key: shard.data for shard in shards.values()} | random | self._counted(state)
            writer = CheckpointWriter(tensors, aside, self.rank)
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
            self._on_all(writer.finish_file)
            hashed = self._hashed_files(writer)
            taken = self._on_first(final.is_dir)
            wrong = self._verify(final) if taken else None
            self._on_first(partial(self._publish, writer.aside, final, state, hashed, replace=wrong is not None))
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

    def _on_all(self, action: Callable[[], None]) -> None:
        """Runs an action on every rank. If it raises OSError or ValueError on one rank, every rank raises ValueError
        with that rank's message."""
        self.stages += 1
        error = None
        try:
            action()
        except (OSError, ValueError) as raised:
            error = _line(raised)
        if failed := first_found(error, self.engine.runtime.device):
            raise ValueError(failed)

    def _on_first(self, action: Callable[[], T]) -> T:
        """The result of an action that rank 0 runs, on every rank. If it raises OSError or ValueError, every rank
        raises ValueError with its message."""
        self.stages += 1
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = action()
            except (OSError, ValueError) as raised:
                told[1] = _line(raised)
        dist.broadcast_object_list(told)
        if told[1]:
            raise ValueError(told[1])
        return told[0]

    def _counted(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What rank 0 writes besides: the optimizer's own count of updates, with which the manifest is compared when
        it is read, and which ranks hold which states of generators."""
        updates = torch.tensor([optimizer_state.counted_updates(self.engine)], device=self.engine.runtime.device)
        dist.all_reduce(updates, op=dist.ReduceOp.MAX)
        assert updates.item() == state["updates"], (updates, state)
        if self.rank > 0:
            return {}
        firsts = checkpoint_random.first_ranks(self.engine.runtime.layout)
        return {UPDATES: updates.cpu(), checkpoint_random.FIRSTS: firsts}

    def _hashed_files(self, writer: CheckpointWriter) -> dict[str, list[Any]]:
        """Name -> [bytes, digest] of the files that the ranks have written, on rank 0: what each has said in its row of
        a table, added up."""
        table = torch.zeros(len(self._writers), 3, dtype=torch.int64, device=self.engine.runtime.device)
        for size, digest in writer.hashed.values():
            words = struct.unpack("<qq", bytes.fromhex(digest))
            table[self._writers.index(self.rank)] = torch.tensor([size, *words], dtype=torch.int64)
        dist.reduce(table, dst=0)
        rows = zip(self._writers, table.tolist(), strict=True)
        return {file_of(rank): [size, struct.pack("<qq", *words).hex()] for rank, (size, *words) in rows if size}

    def _publish(
        self, aside: Path, final: Path, state: dict[str, Any], files: dict[str, list[Any]], *, replace: bool
    ) -> None:
        """Writes the manifest and renames the directory.

        Args:
            files: name -> [bytes, digest].
            replace: the step was saved before and that checkpoint is damaged.
        """
        stored = dict(optimizer_state.save_plan(self.engine).stored)
        for name, shape in ((UPDATES, (1,)), (checkpoint_random.FIRSTS, (self.ranks, 2))):
            stored[name] = StoredTensor(shape, [TensorShard(file_of(0), (0,) * len(shape), shape)])
        missing = {shard.file for tensor in stored.values() for shard in tensor.shards} - files.keys()
        assert not missing, missing
        write_manifest(aside, state, files, stored, self.base)
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
        self._on_all(lambda: optimizer_state.check_stored(self.engine, moments, directory, stored))
        random = self._random_to_load(directory, manifest) if state["world_size"] == self.ranks else {}
        loaded: dict[str, torch.Tensor] = {}
        own_part = optimizer_state.own_part(self.engine)

        def keep(key: str, tensor: torch.Tensor) -> None:
            part = tensor.cpu() if key in weights else own_part(key, tensor)
            loaded.update({} if part is None else {key: part})

        own = {key: (tensor, (0,) * tensor.dim()) for key, (_, tensor) in random.items()}
        read_once(self.engine, directory, manifest, weights | moments, keep, self.progress_sync, own)
        copy_weights(self.engine, loaded)
        optimizer_state.restore(self.engine, loaded, updates=state["updates"])
        if random:
            restore_random_state(dict(random.values()))
        return state

    def _random_to_load(self, directory: Path, manifest: Manifest) -> dict[str, tuple[str, torch.Tensor]]:
        """Key -> (name, uninitialized tensor) of the states of this rank's generators, which become tensors of the
        manifest."""
        device, row = self.engine.runtime.device, None
        if checkpoint_random.FIRSTS in manifest["tensors"]:
            row = torch.empty(1, 2, dtype=torch.int32)
            target = {checkpoint_random.FIRSTS: (row, (self.rank, 0))}
            read_together(directory, manifest, target, device, self.progress_sync)
        stored, wanted, error = {}, {}, None
        try:
            stored, wanted = checkpoint_random.find(directory, manifest, self.rank, None if row is None else row[0])
        except CheckpointDamaged as damaged:
            error = damaged
        if wrong := first_found(error, device):
            raise wrong
        manifest["tensors"] |= stored
        return wanted


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _free_space(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:,.0f} MiB free when it failed)"
    except OSError:  # the directory itself is the problem
        return ""
