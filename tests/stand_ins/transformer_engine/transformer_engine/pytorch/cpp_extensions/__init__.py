"""Stands for transformer_engine.pytorch.cpp_extensions."""

from typing import Any

import torch
from torch import Tensor


def general_grouped_gemm(
    A: list[Tensor],
    B: list[Tensor],
    out: list[Tensor],
    quantization_params: list[Any],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    grad: bool = False,
    accumulate: bool = False,
    use_split_accumulator: bool = False,
    single_output: bool = False,
) -> tuple[list[Tensor], list[Any], list[Any]]:
    """out = op(B) @ op(A) of each pair, where an operand is transposed if its letter is: as in cuBLAS, whose matrices
    are the transposed ones, layout[0] is A's letter, where T means that A is transposed, and layout[1] is B's. The
    extension reads sizes and addresses alone: a tensor that is not contiguous would be read wrongly. m_splits is
    converted to a list of integers whether it is used or not."""
    assert m_splits is not None and all(type(n) is int for n in m_splits) and len(A) == len(B) == len(m_splits)
    assert all(t.is_contiguous() for t in (*A, *B, *out)) and all(q is None for q in quantization_params or ())
    outputs = list(out[0].split(m_splits)) if single_output else out
    for a, b, y in zip(A, B, outputs, strict=True):
        a, b = (a.t() if layout[0] == "T" else a), (b.t() if layout[1] == "T" else b)
        assert y.shape == (b.shape[0], a.shape[1]), (y.shape, a.shape, b.shape)
        product = (b @ a).to(y.dtype)
        y.add_(product) if accumulate else y.copy_(product)
    return out, [torch.empty(0)] * len(A), [torch.empty(0)] * len(A)
