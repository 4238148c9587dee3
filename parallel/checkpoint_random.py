"""The states of the random number generators in a checkpoint.

Replicas usually have the same states, as they were seeded alike. A state that is the same on all ranks of dp_cp, or of
edp, is stored by the first of them; any other by the rank that it is of. The manifest lists none of them: a table tells
each rank which files hold its states.
"""

import functools
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint_format import CheckpointDamaged, StoredTensor, TensorFile, TensorShard
from parallel.checkpoint_manifest import Manifest
from parallel.checkpoint_plan import file_of
from parallel.layout import Layout
from parallel.process_groups import Runtime
from parallel.random_state import dtype_of, random_state

FIRSTS = "random.firsts"
"""The table: int32 [ranks, 2], the first ranks of each rank's dp_cp and edp group."""


def to_save(runtime: Runtime) -> tuple[dict[str, Tensor], bool]:
    """(the states that this rank stores, whether any rank of the world stores states of its own). Every rank calls this
    together."""
    groups, device, rank = runtime.groups, runtime.device, dist.get_rank()
    states = random_state()
    digests = [hashlib.blake2b(t.contiguous().numpy().tobytes(), digest_size=7).digest() for t in states.values()]
    numbers = torch.tensor([int.from_bytes(digest, "little") for digest in digests], device=device)
    stored: dict[str, Tensor] = {}
    left = dict(states)
    for name, group in (("dp_cp", groups.dp_cp), ("edp", groups.edp)):
        bounds = torch.cat([numbers, -numbers])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        most, least = bounds.cpu().chunk(2)
        for key, same in zip(states, (most == -least).tolist(), strict=True):
            if same and (state := left.pop(key, None)) is not None and group.rank() == 0:
                stored[f"random.{name}.{rank}.{key}"] = state
    stored |= {f"random.{rank}.{key}": state for key, state in left.items()}
    own = torch.tensor(bool(left), dtype=torch.int32, device=device)
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return stored, bool(own.item())


@functools.cache
def first_ranks(layout: Layout) -> Tensor:
    """The table."""
    attention, experts = layout.strides("attention"), layout.strides("experts")
    rows = []
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        dense = rank - at["dp"] * attention["dp"][0] - at["cp"] * attention["cp"][0]
        rows.append((dense, rank - at["edp"] * experts["edp"][0]))
    return torch.tensor(rows, dtype=torch.int32)


def find(
    directory: Path, manifest: Manifest, rank: int, firsts: Tensor | None
) -> tuple[dict[str, StoredTensor], dict[str, tuple[str, Tensor]]]:
    """Where the states of a rank are stored, and for each of these tensors (name of the state, tensor for it).

    Args:
        firsts: the rank's row of the table; None: the manifest lists the states, as in format 2.

    Raises:
        CheckpointDamaged: a file cannot be read.
    """
    stored: dict[str, StoredTensor] = {}
    prefixes: dict[str, str] = {}
    if firsts is None:
        prefix = f"random.{rank}."
        stored = {key: tensor for key, tensor in manifest["tensors"].items() if key.startswith(prefix)}
        prefixes = dict.fromkeys(stored, prefix)
    else:
        dense, experts = firsts.tolist()
        for kind, first in (("", rank), ("dp_cp.", dense), ("edp.", experts)):
            prefix = f"random.{kind}{first}."
            if (file := file_of(first)) in manifest["files"]:
                for key, (_, shape) in _entries(directory / file).items():
                    if key.startswith(prefix):
                        stored[key] = StoredTensor(shape, [TensorShard(file, (0,) * len(shape), shape)])
                        prefixes[key] = prefix
    names = {key: key.removeprefix(prefix) for key, prefix in prefixes.items()}
    return stored, {key: (n, torch.empty(stored[key].shape, dtype=dtype_of(n))) for key, n in names.items()}


def _entries(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with TensorFile(path) as file:
            return file.entries()
    except OSError as error:
        raise CheckpointDamaged(f"{path.name} cannot be read: {error}") from None
