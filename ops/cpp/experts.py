"""The experts' products and activations in C++ (experts.cpp), as a GEMM backend.

oneDNN, which multiplies bf16 for torch on a CPU, compiles a kernel for every shape. These take any number of rows, read
them from where they lie, and add a weight's gradient to Megatron-Core's fp32 buffer.

Legend: T tokens, R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden,
G 2 for gated activations, else 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.cpp.operators import NAMESPACE
from ops.experts import ExpertBackend
from ops.gemm_backend import Weight, main_gradient

KINDS = ("swiglu", "geglu", "gelu", "relu", "relu2")
"""In the order of experts.cpp."""


@dataclass(frozen=True)
class Operand:
    """x [R, K], or of x [T, K] the rows row_R."""

    x_RK: Tensor
    row_R: Tensor | None = None


class NativeGemmBackend:
    """bf16, added up in fp32."""

    def groups(self, counts: list[int], device: torch.device) -> Tensor:
        """int64 [L + 1]: where each expert's rows begin, and where the last one's end."""
        return torch.tensor([0, *counts]).cumsum(0)

    def weight(self, w_LKN: Tensor) -> Weight:
        transposed = w_LKN.stride(2) != 1 and w_LKN.stride(1) == 1
        dense_LKN = w_LKN.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w_LKN.contiguous()
        return Weight(dense_LKN, dense_LKN.transpose(1, 2))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Operand:
        return Operand(x_RK.contiguous(), None if row_R is None else row_R.contiguous())

    def product(self, x_RK: Operand, w_LKN: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
        return NAMESPACE.grouped_product.default(x_RK.x_RK, x_RK.row_R, w_LKN, groups)

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None = None) -> Operand:
        return Operand(NAMESPACE.activate.default(h_RGF, KINDS.index(name), keep_RF))

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Operand]:
        a_RF = da_RF.contiguous()
        dh_RGF = NAMESPACE.activate_backward_.default(a_RF, h_RGF, KINDS.index(name), keep_RF)
        dh_RN = dh_RGF.flatten(1)
        return a_RF, dh_RN, Operand(dh_RN)

    def columns(self, x_RK: Tensor, groups: Tensor, row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        return (x_RK.contiguous(),) if row_R is None else (x_RK.contiguous(), row_R.contiguous())

    def weight_gradient(self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: Tensor, w: Tensor) -> Tensor:
        (left_RK, *rows), (right_RN,) = x_RK, dy_RN
        row_R, main = rows[0] if rows else None, main_gradient(w)
        if main is None:
            return NAMESPACE.grouped_weight_gradient.default(left_RK, row_R, right_RN, groups).view(w.shape)
        sum_LKN = main.view(-1, left_RK.shape[1], right_RN.shape[1])
        NAMESPACE.grouped_weight_gradient_add_.default(sum_LKN, left_RK, row_R, right_RN, groups)
        return torch.empty_like(w, memory_format=torch.contiguous_format)


EXPERTS = ExpertBackend.on(NativeGemmBackend())
