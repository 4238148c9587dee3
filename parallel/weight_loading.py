"""Loads the weights of a checkpoint into a model and reports the ones that do not match."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import optimizer_state
from parallel.checkpoint_exchange import broadcast_from_readers, reader
from parallel.checkpoint_format import CheckpointDamaged, StoredTensor, read_tensors
from parallel.checkpoint_manifest import Manifest, read_manifest_together, run_to_completion
from parallel.engine import Engine
from parallel.first_found import first_found
from parallel.progress_sync import ProgressSync
from parallel.sharding import logical_name

Shape = tuple[int, ...]

_PREFIX = "weights."
_TRANSIENT = (".last_load", *(f".fp8_state.{name}_{way}" for name in ("scale", "amax") for way in ("fwd", "bwd")))
"""Suffixes of tensors that hold what a router counted in one step, and the scales of delayed scaling in FP8. A model
without them ignores them, and one in which they have another shape begins anew."""


@dataclass(frozen=True)
class Mismatch:
    """Names of the weights that a checkpoint and a model, over all ranks, do not have in common."""

    missing: list[str]
    """In the model, not in the checkpoint."""
    mismatched: list[str]
    """In both with different shapes: `name (checkpoint's shape in the checkpoint, model's shape in the model)`."""
    unexpected: list[str]
    """In the checkpoint, not in the model."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.mismatched or self.unexpected)

    def __str__(self) -> str:
        parts = {
            "not in the checkpoint": self.missing,
            "of another shape": self.mismatched,
            "not in the model": self.unexpected,
        }
        return "; ".join(f"{what}: {_shortened(names)}" for what, names in parts.items() if names)


Target = tuple[Tensor, tuple[int, ...]]
"""A CPU tensor, and its offset in the logical tensor."""
Select = Callable[[str], bool]
"""Which of a model's weights are loaded, by logical name. State that is set by a rule is always among them."""


def match_weights(engine: Engine, stored: dict[str, Shape], only: Select | None = None) -> tuple[Mismatch, set[str]]:
    """Compares the weights of a model with those of a checkpoint. Every rank calls this together.

    Args:
        stored: logical shapes of the checkpoint's tensors, by key.
        only: the weights of the model to compare; None: all.

    Returns:
        The weights that do not match, and the keys of those that do. State that is set by a rule (Sharding.is_state)
        may be missing.
    """
    pp = engine.runtime.groups.pp  # the stages of a pipeline have all of the model's parameters between them
    of_ranks: list[Any] = [None] * pp.size()
    dist.all_gather_object(of_ranks, (optimizer_state.logical_shapes(engine), optimizer_state.states(engine)), group=pp)
    model: dict[str, Shape] = {name: shape for shapes, _ in of_ranks for name, shape in shapes.items()}
    states = {name for _, names in of_ranks for name in names}
    if only is not None:
        model = {name: shape for name, shape in model.items() if only(name) or name in states}
    found = {key.removeprefix(_PREFIX): shape for key, shape in stored.items() if key.startswith(_PREFIX)}
    same = {name for name, shape in model.items() if found.get(name) == shape}
    mismatched = sorted(name for name in (model.keys() & found.keys()) - same if not name.endswith(_TRANSIENT))
    mismatch = Mismatch(
        missing=sorted(model.keys() - found.keys() - states),
        mismatched=[f"{name} ({found[name]} in the checkpoint, {model[name]} in the model)" for name in mismatched],
        unexpected=sorted(name for name in found.keys() - model.keys() if not name.endswith(_TRANSIENT)),
    )
    return mismatch, {_PREFIX + name for name in same}


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def find_weights(
    engine: Engine,
    directory: Path,
    stored: dict[str, StoredTensor],
    *,
    partial: bool,
    only: Select | None = None,
) -> tuple[Mismatch, dict[str, Any]]:
    """(the weights that do not match, this rank's shards of those that do, without data). Arguments and errors as for
    `load_weights`."""
    shapes = {name: tensor.shape for name, tensor in stored.items() if tensor.is_complete()}
    mismatch, matching = match_weights(engine, shapes, only)
    if mismatch and not partial:
        raise ValueError(f"{directory} is of another model: {mismatch}")
    if not matching:
        raise ValueError(f"{directory} has no weights in common with this model: {mismatch}")
    return mismatch, {key: shard for key, shard in optimizer_state.weights_to_load(engine).items() if key in matching}


def load_weights(
    engine: Engine,
    directory: Path,
    *,
    partial: bool = False,
    progress_sync: ProgressSync | None = None,
    only: Select | None = None,
) -> Mismatch:
    """Loads the weights, without optimizer states, into the model and the optimizer's master weights.

    Args:
        partial: keep the initial values of weights that are missing or of another shape, instead of raising.
        progress_sync: keeps the ranks of a training run in step while they read.
        only: the weights of the model to load; None: all.

    Returns:
        The weights that do not match. State that is set by a rule (Sharding.is_state) may be missing from the
        checkpoint; it then keeps its initial value.

    Raises:
        ValueError: the checkpoint is of another model, has nothing in common with this one, or cannot be read.
    """
    manifest = read_manifest_together(directory)
    mismatch, wanted = find_weights(engine, directory, manifest["tensors"], partial=partial, only=only)
    loaded: dict[str, Tensor] = {}
    read_once(engine, directory, manifest, wanted, lambda key, t: loaded.update({key: t.cpu()}), progress_sync)
    copy_weights(engine, loaded)
    return mismatch


def read_once(
    engine: Engine,
    directory: Path,
    manifest: Manifest,
    wanted: dict[str, Any],
    keep: Callable[[str, Tensor], None],
    progress_sync: ProgressSync | None,
    own: dict[str, Target] | None = None,
) -> None:
    """Reads tensors from a checkpoint, each on one rank of its replica group, which broadcasts it to the others. Every
    rank calls this together; a failure on one rank is raised on all, before any tensor is kept.

    Args:
        manifest: as `read_manifest` returns it. What is read is compared with it.
        wanted: name -> Megatron-Core's ShardedTensor, without data; the same on all ranks of a replica group.
        keep: called with each of them, fp32 on the device, or on the CPU where one rank alone has read it.
        progress_sync: as for `load_weights`.
        own: tensors that this rank reads besides, for itself.

    Raises:
        CheckpointDamaged: a tensor is missing, has changed or cannot be read.
    """
    groups, group_of = engine.runtime.groups, optimizer_state.replica_groups(engine)
    shapes: dict[dist.ProcessGroup, dict[str, torch.Size]] = {groups.dp_cp: {}, groups.edp: {}}
    targets = dict(own or {})
    for key, shard in wanted.items():
        group = group_of[key.partition(".")[2]]
        if reader(len(shapes[group]), group) == group.rank():
            targets[key] = torch.empty(shard.local_shape), tuple(shard.global_offset)
        shapes[group][key] = shard.local_shape
    read_together(directory, manifest, targets, engine.runtime.device, progress_sync)
    read = {key: tensor for key, (tensor, _) in targets.items()}
    for group, of_group in shapes.items():
        broadcast_from_readers(of_group, read, keep, group, engine.runtime.device)


def read_together(
    directory: Path,
    manifest: Manifest,
    targets: dict[str, Target],
    device: torch.device,
    progress_sync: ProgressSync | None,
) -> None:
    """Fills tensors from a checkpoint. Every rank calls this together; a failure on one rank is raised on all.

    Raises:
        CheckpointDamaged: a tensor is missing, has changed or cannot be read.
    """

    def read() -> Iterator[int]:
        try:
            yield from read_tensors(directory, manifest["tensors"], targets, manifest["files"])
        except CheckpointDamaged as error:
            return error
        return None

    wrong = progress_sync.run(read()) if progress_sync else first_found(run_to_completion(read()), device)
    if wrong is not None:
        raise wrong


def copy_weights(engine: Engine, loaded: dict[str, Tensor]) -> None:
    """Copies loaded weights into the parameters and the optimizer's master weights."""
    with torch.no_grad():
        for module in engine.modules:
            for name, parameter in module.named_parameters():
                if (key := f"weights.{logical_name(name, parameter)}") in loaded:
                    parameter.copy_(loaded[key])
    optimizer_state.restore_master(engine, loaded)
