"""What one of many ranks has to say, told to all: an error, mostly. Costs one small all-reduce where none has."""

from typing import TypeVar

import torch
import torch.distributed as dist

Found = TypeVar("Found")


def first_found(mine: Found | None, device: torch.device) -> Found | None:
    """The value of the lowest rank that has one, on all ranks; None: no rank has. Every rank calls this together.

    Args:
        device: of the tensors in collectives.
    """
    ranks = dist.get_world_size()
    first = torch.tensor(ranks if mine is None else dist.get_rank(), dtype=torch.int64, device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    rank = int(first.item())
    if rank == ranks:
        return None
    told: list[Found | None] = [mine]
    dist.broadcast_object_list(told, src=rank)
    return told[0]
