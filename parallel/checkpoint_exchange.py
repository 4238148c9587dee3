"""Moves the tensors of a checkpoint between the ranks of a replica group, which hold the same shards of the model or
parts of them: to the ranks that write, and from those that have read."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint_plan import Part

ROUND = 2**26
"""Elements that are exchanged at once, which bounds temporary memory."""


def gather_to_owners(
    parts: Sequence[Part],
    values: Callable[[Part], Tensor | None],
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, Tensor]:
    """The shards that this rank owns, by key: new tensors on the CPU. Every rank of the group calls this together, and
    sends and receives each element at most once.

    Args:
        parts: all of one group, with spans.
        values: this rank's part of a flattened shard; None: it is zero, or the rank has none.
    """
    if group.size() == 1:
        return {part.key: _copied(part, values(part)) for part in parts}
    found = {p.key: torch.empty(p.size, dtype=p.dtype) for p in parts if p.owner == group.rank()}
    for batch in _rounds(parts):
        _exchange(batch, values, group, device, found)
    return found


def _copied(part: Part, values: Tensor | None) -> Tensor:
    if values is None:
        return torch.zeros(part.size, dtype=part.dtype)
    return values.detach().to("cpu", part.dtype, copy=True).view(part.size)


def _rounds(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts of one dtype, of ROUND elements or one part."""
    batch: list[Part] = []
    elements = 0
    for part in sorted(parts, key=lambda part: str(part.dtype)):
        if batch and (elements + part.parameter.numel() > ROUND or part.dtype != batch[0].dtype):
            yield batch
            batch, elements = [], 0
        batch.append(part)
        elements += part.parameter.numel()
    if batch:
        yield batch


def _exchange(
    batch: list[Part],
    values: Callable[[Part], Tensor | None],
    group: dist.ProcessGroup,
    device: torch.device,
    found: dict[str, Tensor],
) -> None:
    """One all-to-all: from every rank its parts in the order of their owners, to every owner in the order of ranks."""
    me, ranks, dtype = group.rank(), group.size(), batch[0].dtype
    send, receive = [0] * ranks, [0] * ranks
    leaving: list[tuple[Part, int]] = []
    coming: list[tuple[int, int, int, Part]] = []
    for part in sorted(batch, key=lambda part: part.owner):
        for rank, start, end in part.spans or ():
            if rank == me:
                leaving.append((part, end - start))
                send[part.owner] += end - start
            if part.owner == me:
                coming.append((rank, start, end, part))
                receive[rank] += end - start
    sent = torch.zeros(sum(send), dtype=dtype, device=device)
    at = 0
    for part, count in leaving:
        if (held := values(part)) is not None:
            sent[at : at + count].copy_(held.detach())
        at += count
    received = torch.empty(sum(receive), dtype=dtype, device=device)
    dist.all_to_all_single(received, sent, receive, send, group=group)
    host, at = received.cpu(), 0
    for _, start, end, part in sorted(coming, key=lambda entry: entry[0]):  # stable: in the order of the batch
        found[part.key].view(-1)[start:end] = host[at : at + end - start]
        at += end - start


def broadcast_from_readers(
    shapes: dict[str, torch.Size],
    read: dict[str, Tensor],
    keep: Callable[[str, Tensor], None],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Hands fp32 tensors, each of which one rank of the group has read, to all ranks. Every rank calls this together.

    Args:
        shapes: of all tensors, in the same order on all ranks; `reader` tells which rank has read each.
        read: those of this rank, on the CPU.
        keep: called with each tensor, on the CPU or on the device.
    """
    for index, (key, shape) in enumerate(shapes.items()):
        if group.size() == 1:
            keep(key, read.pop(key))
            continue
        source = reader(index, group)
        here = group.rank() == source
        tensor = read.pop(key).to(device) if here else torch.empty(shape, device=device)
        dist.broadcast(tensor, group=group, group_src=source)
        keep(key, tensor)


def reader(index: int, group: dist.ProcessGroup) -> int:
    """The rank of a group that reads its tensor number `index`."""
    return index % group.size()
