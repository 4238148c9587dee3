"""How the grouped products are cut into tiles on the device at hand, and what its copy engine can fetch.

Legend: R rows, K inner and N outer dimension of a product, L experts.
"""

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.fp8_numerics import BLOCK

ROWS = 128
"""Rows of a tile."""
ALIGNED = 16
"""Bytes that what the copy engine reads begins at a multiple of."""
SHARED = 227 * 2**10
"""Bytes of shared memory of a program on Hopper, which the tiles were measured on (docs/kernels.md)."""
Tile = dict[str, int]


@functools.cache
def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter runs one after the other


@functools.cache
def product_tile(device: torch.device, narrow: bool, descriptors: bool) -> Tile:
    """BN, BK and the stages that run ahead, as measured on an H100. Scales of FP8 operands (`narrow`) bind BN and BK,
    and beside the sums in fp32 that they need no more columns would fit the registers."""
    if narrow:
        return _fitting(device, BLOCK, BLOCK, 1, 4, "BK")
    return _fitting(device, 2 * BLOCK, 64, 2, 3 if descriptors else 4, "BK")


@functools.cache
def gradient_tile(device: torch.device, narrow: bool) -> Tile:
    """BN, BR and stages of a weight gradient, of FP8 operands where `narrow`."""
    if narrow:
        return _fitting(device, BLOCK, ROWS, 1, 4, "BR")
    return _fitting(device, 2 * BLOCK, 64, 2, 4, "BR")


def _fitting(device: torch.device, columns: int, inner: int, width: int, stages: int, axis: str) -> Tile:
    """Fewer stages, then fewer columns, where shared memory is smaller than Hopper's."""
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else SHARED
    while (ROWS + columns) * inner * width * stages > shared:
        stages, columns = (stages - 1, columns) if stages > 2 else (4, columns // 2)
    return {"BM": ROWS, "BN": columns, axis: inner, "num_stages": stages}


def can_describe(x_RK: Tensor, w_LKN: Tensor, inner: int) -> bool:
    """Whether descriptors can hold both: K or N of the weight is contiguous and experts follow each other without a
    gap. Where N is, a tile of `inner` must not reach from one expert into the next."""
    columns_first = w_LKN.stride(1) == 1
    w = w_LKN.transpose(1, 2) if columns_first else w_LKN
    if not (w.is_contiguous() and (columns_first or w.shape[1] % inner == 0)):
        return False
    flat = x_RK, w.flatten(0, 1)
    return all(t.data_ptr() % ALIGNED == 0 and t.stride(0) * t.element_size() % ALIGNED == 0 for t in flat)


def describe(x_RK: Tensor, w_LKN: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of x and of the weight, flattened as `ops.triton.grouped_gemm.grouped_product` takes it."""
    columns_first = w_LKN.stride(1) == 1
    w = (w_LKN.transpose(1, 2) if columns_first else w_LKN).flatten(0, 1)
    block = [tile["BN"], tile["BK"]] if columns_first else [tile["BK"], tile["BN"]]
    return TensorDescriptor.from_tensor(x_RK, [tile["BM"], tile["BK"]]), TensorDescriptor.from_tensor(w, block)
