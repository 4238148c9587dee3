"""The experts' products and activations in C++ (experts.cpp), as a GEMM backend.

oneDNN, which multiplies bf16 for torch on a CPU, compiles a kernel for every shape. These take any number of rows, read
them from where they lie, and add a weight's gradient to Megatron-Core's fp32 buffer.

Legend: T tokens, R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden,
G 2 for gated activations, else 1.
"""

from ctypes import c_bool, c_int, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.cpp.build import call, data_of, library, threads
from ops.experts import ExpertBackend
from ops.gemm_backend import Weight, main_gradient

KINDS = ("swiglu", "geglu", "gelu", "relu", "relu2")
"""In the order of experts.cpp."""


def _dense(t: Tensor) -> Tensor:
    """Its values side by side in memory."""
    assert t.dtype == torch.bfloat16
    return t.contiguous()


def _numbers(row_R: Tensor) -> Tensor:
    assert row_R.dtype == torch.int64
    return row_R.contiguous()


def _dense_or_none(t: Tensor | None) -> Tensor | None:
    return None if t is None else _dense(t)


@dataclass(frozen=True)
class Operand:
    """x [R, K], or of x [T, K] the rows row_R."""

    x_RK: Tensor
    row_R: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_RK if self.row_R is None else self.row_R)


class NativeGemmBackend:
    """bf16, added up in fp32."""

    def groups(self, counts: list[int], device: torch.device) -> Tensor:
        """int64 [L + 1]: where each expert's rows begin, and where the last one's end."""
        return torch.tensor([0, *counts]).cumsum(0)

    def weight(self, w_LKN: Tensor) -> Weight:
        transposed = w_LKN.stride(2) != 1 and w_LKN.stride(1) == 1
        dense_LKN = _dense(w_LKN.transpose(1, 2)).transpose(1, 2) if transposed else _dense(w_LKN)
        return Weight(dense_LKN, dense_LKN.transpose(1, 2))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Operand:
        return Operand(_dense(x_RK), None if row_R is None else _numbers(row_R))

    def product(self, x_RK: Operand, w_LKN: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
        experts, inner, outer = w_LKN.shape
        assert dtype == torch.bfloat16 and x_RK.x_RK.shape[1] == inner and int(groups[-1]) == len(x_RK)
        transposed = not w_LKN.is_contiguous()
        y_RN = x_RK.x_RK.new_empty((len(x_RK), outer))
        call(
            library().switchyard_product,
            c_int64(experts), data_of(groups), data_of(x_RK.x_RK), data_of(x_RK.row_R),
            data_of(w_LKN.transpose(1, 2) if transposed else w_LKN), c_bool(transposed),
            c_int64(inner), c_int64(outer), data_of(y_RN),
        )  # fmt: skip
        return y_RN

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None = None) -> Operand:
        h_RGF, keep_RF = _dense(h_RGF), _dense_or_none(keep_RF)
        rows, _, width = h_RGF.shape
        a_RF = h_RGF.new_empty((rows, width))
        library().switchyard_activate(
            c_int(KINDS.index(name)), c_int64(rows), c_int64(width),
            data_of(h_RGF), data_of(keep_RF), data_of(a_RF), threads(),
        )  # fmt: skip
        return Operand(a_RF)

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Operand]:
        h_RGF, da_RF, keep_RF = _dense(h_RGF), _dense(da_RF), _dense_or_none(keep_RF)
        rows, _, width = h_RGF.shape
        a_RF, dh_RN = da_RF, torch.empty_like(h_RGF).flatten(1)  # a value of da is read before it is written
        library().switchyard_activate_back(
            c_int(KINDS.index(name)), c_int64(rows), c_int64(width),
            data_of(h_RGF), data_of(da_RF), data_of(keep_RF), data_of(a_RF), data_of(dh_RN),
            threads(),
        )  # fmt: skip
        return a_RF, dh_RN, Operand(dh_RN)

    def columns(self, x_RK: Tensor, groups: Tensor, row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        return (_dense(x_RK),) if row_R is None else (_dense(x_RK), _numbers(row_R))

    def weight_gradient(self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: Tensor, w: Tensor) -> Tensor:
        (left_RK, *row_R), (right_RN,) = x_RK, dy_RN
        main = main_gradient(w)
        assert int(groups[-1]) == len(right_RN) and (main is None or main.dtype == torch.float32)
        dw = torch.empty_like(w, memory_format=torch.contiguous_format)
        call(
            library().switchyard_weight_gradient,
            c_int64(len(groups) - 1), data_of(groups), data_of(left_RK), data_of(row_R[0] if row_R else None),
            data_of(right_RN), c_int64(left_RK.shape[1]), c_int64(right_RN.shape[1]),
            data_of(dw if main is None else main), c_bool(main is not None),
        )  # fmt: skip
        return dw


EXPERTS = ExpertBackend.on(NativeGemmBackend())
