"""Elementwise work a block of rows at a time. Over a tensor larger than the cache every operation of a chain reads and
writes memory; over a block they stay in cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_VALUES = 2**17
"""fp32 values of a block that a core's second-level cache holds together with a result."""
GPU_VALUES = 2**26
"""There it only bounds temporary memory."""
NORM_ROW = 1024
"""Values whose squares fp32 adds up well."""


def rows_at_once(width: int, device: torch.device) -> int:
    """Rows of `width` values in a block for all threads of this rank."""
    values = CPU_VALUES * torch.get_num_threads() if device.type == "cpu" else GPU_VALUES
    return max(1, values // max(1, width))


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all values of fp32 or bf16 tensors, in fp64. A CPU's fp32 sum over a million values is 6e-5 off, by another
    amount under each layout; but it copies what it sums in another precision, and so takes the norms of rows of 1,024
    values in fp32, which are off by less than 1e-6, unless that overflows. Values below 1e-20 count as little or
    nothing."""
    device = tensors[0].device
    if device.type != "cpu":
        blocks = [block for t in tensors for block in t.flatten().split(rows_at_once(1, device))]
        return torch.stack(torch._foreach_norm(blocks, 2, torch.float64)).square().sum()
    norms: list[Tensor] = []
    for values in (t.flatten() for t in tensors):
        whole = len(values) // NORM_ROW * NORM_ROW
        parts = values[:whole].view(-1, NORM_ROW), values[None, whole:]
        norms += [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in parts]
    square = torch.cat(norms).double().square().sum()
    return square if square.isfinite() else torch.stack([t.double().square().sum() for t in tensors]).sum()
