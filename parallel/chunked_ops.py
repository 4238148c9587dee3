"""Block sizes for elementwise operations on large tensors, and a sum of squares that uses them.

A chain of operations over a tensor larger than the cache reads and writes memory at every operation. Over one block at
a time, intermediate results stay in cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_VALUES = 2**17
"""fp32 values of a block that fits into a core's L2 cache together with a result."""
GPU_VALUES = 2**26
"""On a GPU the block size only bounds temporary memory."""
NORM_ROW = 1024
"""Values in a row whose squares are summed in fp32."""


def rows_at_once(width: int, device: torch.device) -> int:
    """Number of rows of `width` values in a block, for all threads of this rank together."""
    values = CPU_VALUES * torch.get_num_threads() if device.type == "cpu" else GPU_VALUES
    return max(1, values // max(1, width))


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all values of fp32 or bf16 tensors, in fp64.

    On a CPU an fp32 sum over a million values has a relative error of 6e-5, which differs between layouts, and a sum
    in another precision copies its input. The norms of rows of 1,024 values are therefore computed in fp32 (relative
    error below 1e-6) and added in fp64; if fp32 overflows, everything is computed in fp64. Values below 1e-20 may
    count as zero.
    """
    device = tensors[0].device
    if device.type != "cpu":
        blocks = [block for t in tensors for block in t.flatten().split(rows_at_once(1, device))]
        norms_of_blocks = torch._foreach_norm(blocks, 2, torch.float64)  # pyright: ignore[reportPrivateUsage]
        return torch.stack(norms_of_blocks).square().sum()
    norms: list[Tensor] = []
    for values in (t.flatten() for t in tensors):
        whole = len(values) // NORM_ROW * NORM_ROW
        parts = values[:whole].view(-1, NORM_ROW), values[None, whole:]
        norms += [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in parts]
    square = torch.cat(norms).double().square().sum()
    return square if square.isfinite() else torch.stack([t.double().square().sum() for t in tensors]).sum()
