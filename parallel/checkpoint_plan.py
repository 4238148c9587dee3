"""Which rank writes which shard of a checkpoint: planned, and proven to be complete, once for all checkpoints of a run.

The ranks of a *replica group* (dp_cp; of experts edp) hold the same shard of every parameter, or parts of it, and each
of them can tell by itself who writes what. So the first rank of every group describes the group's shards, rank 0
validates these descriptions, and every rank compares what it writes with what was planned for it. The bytes that pass
through rank 0 depend on the model and on its sharding, not on the number of replicas.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.checkpoint_format import StoredTensor, TensorShard
from parallel.checkpoint_manifest import incomplete
from parallel.first_found import first_found
from parallel.layout import Layout
from parallel.process_groups import Runtime

WRITERS = 8
"""Ranks of a replica group that write, unless their files would exceed FILE_BYTES: then more do."""
FILE_BYTES = 2**28
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter's shard, or that of what the optimizer keeps of it, of which the ranks of a replica group hold
    parts."""

    key: str
    """Name of the tensor in a checkpoint."""
    kind: str
    parameter: nn.Parameter
    dtype: torch.dtype
    shape: Shape
    """Of the logical tensor."""
    offset: Shape
    """Of the shard in it."""
    spans: tuple[tuple[int, int, int], ...] | None
    """(rank of the group, start, end) of each part in the flattened shard; None: every rank has all of it."""
    owner: int
    """The rank of the group that writes it."""

    @property
    def size(self) -> Shape:
        return tuple(self.parameter.shape)


@dataclass(frozen=True)
class SavePlan:
    families: tuple[tuple[dist.ProcessGroup, tuple[Part, ...]], ...]
    """The replica groups of this rank, and what their ranks write."""
    writers: tuple[int, ...]
    """The ranks of the world that may write a file; the same on all ranks."""
    stored: dict[str, StoredTensor]
    """On rank 0 the tensors that all ranks write; nothing on the others."""

    def mine(self) -> Iterator[Part]:
        """What this rank writes."""
        for group, parts in self.families:
            yield from (part for part in parts if part.owner == group.rank())

    def check(self, tensors: dict[str, Any], device: torch.device) -> None:
        """Every rank calls this together.

        Args:
            tensors: name -> Megatron-Core's ShardedTensor, which this rank is about to write.

        Raises:
            CheckpointingException: on all ranks, if a rank does not write what was planned for it.
        """
        planned = {part.key: (part.shape, part.offset, part.size, part.dtype) for part in self.mine()}
        actual = {
            t.key: (tuple(t.global_shape), tuple(t.global_offset), tuple(t.local_shape), t.dtype)
            for t in tensors.values()
        }
        wrong = [key for key in {**planned, **actual} if planned.get(key) != actual.get(key)]
        _raise_together(
            f"rank {dist.get_rank()} writes {actual.get(wrong[0])} of {wrong[0]} instead of {planned.get(wrong[0])}"
            if wrong
            else None,
            device,
        )


def file_of(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def writing_ranks(size: int, writers: int) -> list[int]:
    """The ranks that write, of a replica group of `size` ranks: at most `writers`, far from each other."""
    count = min(size, writers)
    return [i * size // count for i in range(count)]


def writers_wanted(nbytes: int) -> int:
    """How many ranks of a replica group should write `nbytes`."""
    return max(WRITERS, -(-nbytes // FILE_BYTES))


def writers_of(layout: Layout, writers: int) -> tuple[int, ...]:
    """The ranks of the world that may write a file, if at most `writers` of each replica group do."""
    dense = set(writing_ranks(layout.dp * layout.cp, writers))
    experts = set(writing_ranks(layout.edp, writers))
    found = []
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        if at["dp"] * layout.cp + at["cp"] in dense or at["edp"] in experts:
            found.append(rank)
    return tuple(found)


def made_plan(
    runtime: Runtime, families: Sequence[tuple[dist.ProcessGroup, tuple[Part, ...]]], writers: int, expected: Any
) -> SavePlan:
    """Validates a plan. Every rank calls this together.

    Args:
        families: of dense parameters, then of experts.
        writers: of each replica group.
        expected: name -> shape of the logical tensors of this rank's model chunks.

    Raises:
        CheckpointingException: on all ranks, if an element of the model is written by no rank, or by several.
    """
    groups, described = runtime.groups, []
    dense_path, expert_path = (groups.tp, groups.pp), (groups.etp, groups.ep, groups.pp)
    for (group, parts), path in zip(families, (dense_path, expert_path), strict=True):
        _assert_same(parts, group, runtime.device)
        first = [_described(part, group) for part in parts] if group.rank() == 0 else None
        described.append(_gather(first, path))
    is_first = groups.dp_cp.rank() == 0 and groups.tp.rank() == 0
    shapes = _gather(list(expected.items()) if is_first else None, (groups.pp,))
    stored: dict[str, StoredTensor] = {}
    wrong = None
    if dist.get_rank() == 0:
        entries = [entry for family in described for entry in family or ()]
        for key, shape, offset, size, _, rank in entries:
            tensor = stored.setdefault(key, StoredTensor(shape, []))
            tensor.shards.append(TensorShard(file_of(rank), offset, size))
        wrong = tiles_wrongly(entries) or incomplete(dict(shapes or ()), stored)
    _raise_together(wrong, runtime.device)
    return SavePlan(tuple(families), writers_of(runtime.layout, writers), stored)


def _described(part: Part, group: dist.ProcessGroup) -> tuple[str, Shape, Shape, Shape, torch.dtype, int]:
    rank = dist.get_global_rank(group, part.owner)
    return part.key, part.shape, part.offset, part.size, part.dtype, rank


def _assert_same(parts: tuple[Part, ...], group: dist.ProcessGroup, device: torch.device) -> None:
    """Whether the ranks of a group have made the same plan, since only the first one's is validated."""
    text = repr([(*_described(part, group), part.spans) for part in parts]).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    assert bounds.tolist() == [number, -number], "ranks of a replica group plan different checkpoints"


def _gather(mine: list[Any] | None, path: Sequence[dist.ProcessGroup]) -> list[Any] | None:
    """Concatenates lists over one group after the other, on the first rank of each. A rank without a list (None) takes
    no part, as none of its group does."""
    for group in path:
        if mine is not None and group.size() > 1:
            gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
            dist.gather_object(mine, gathered, group=group, group_dst=0)
            mine = None if gathered is None else [entry for part in gathered for entry in part]
    return mine


def tiles_wrongly(entries: list[tuple[str, Shape, Shape, Shape, torch.dtype, int]]) -> str | None:
    """Whether shards overlap or leave holes, as Megatron-Core sees it; None: neither."""
    from megatron.core.dist_checkpointing import ShardedTensor, validation
    from megatron.core.dist_checkpointing.core import CheckpointingException

    shards = [
        ShardedTensor(key, None, dtype, size, shape, offset, tuple(a // b for a, b in zip(shape, size, strict=True)))
        for key, shape, offset, size, dtype, _ in entries
    ]
    try:
        validation.validate_sharding_integrity([shards])  # pyright: ignore[reportArgumentType]
    except (CheckpointingException, AssertionError) as error:
        return str(error)
    return None


def _raise_together(wrong: str | None, device: torch.device) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException

    if found := first_found(wrong, device):
        raise CheckpointingException(found)
