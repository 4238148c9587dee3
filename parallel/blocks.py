"""Elementwise work a block of rows at a time. Over a tensor larger than the cache every operation of a chain reads and
writes memory; over a block they stay in cache."""

import torch

CPU_VALUES = 2**17
"""fp32 values of a block that a core's second-level cache holds together with a result."""
GPU_VALUES = 2**26
"""There it only bounds temporary memory."""


def rows_at_once(width: int, device: torch.device) -> int:
    """Rows of `width` values in a block for all threads of this rank."""
    values = CPU_VALUES * torch.get_num_threads() if device.type == "cpu" else GPU_VALUES
    return max(1, values // max(1, width))
