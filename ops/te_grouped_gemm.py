"""The experts' products by TransformerEngine's grouped product, on weights as they lie.

Its layers want weights [N, K]. The function under them takes any layout of bf16 matrices: with the weights [K, N] that
experts have here nothing is transposed or copied, forward or backward, and gradients are added to the fp32 main
gradient by the product itself.

Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts of this rank, F expert hidden,
G 2 for gated activations, else 1.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.gemm_backend import GemmBackend, Weight, main_gradient


@dataclass(frozen=True)
class Matrices:
    """The weights of some experts, as an operand."""

    w_LKN: Tensor
    layout: str
    """NN: rows are multiplied by w; TN: by w.T. The letters are of cuBLAS, which reads a matrix in rows as its
    transposed one: the first is the weights', the second that of the rows."""

    def __getitem__(self, experts: slice) -> "Matrices":
        return Matrices(self.w_LKN[experts], self.layout)


class TeGemmBackend:
    """ops.gemm_backend.GemmBackend in bf16; activations are another backend's."""

    def __init__(self, activations: GemmBackend):
        from transformer_engine.pytorch.cpp_extensions import (  # pyright: ignore[reportMissingImports]
            general_grouped_gemm,
        )

        self.activations, self._gemm = activations, general_grouped_gemm
        takes = inspect.signature(general_grouped_gemm).parameters
        self._takes_quantizers = "quantization_params" in takes  # since 2.11
        self._further: dict[str, Any] = {}
        if "workspaces" in takes:  # until 2.9
            from transformer_engine.pytorch.module.base import (  # pyright: ignore[reportMissingImports]
                get_multi_stream_cublas_workspace,
            )

            self._further = {"workspaces": get_multi_stream_cublas_workspace()}

    def _multiply(self, a: list[Tensor], b: list[Tensor], out: list[Tensor], counts: list[int], **how: Any) -> None:
        """out = op(b) @ op(a) of each pair. It reads addresses and sizes alone: every tensor is contiguous."""
        assert all(t.is_contiguous() for t in (*a, *b, *out))
        quantizers = {"quantization_params": [None] * len(a)} if self._takes_quantizers else {}
        self._gemm(a, b, out, out_dtype=out[0].dtype, m_splits=counts, **how, **quantizers, **self._further)

    def groups(self, counts: list[int], device: torch.device) -> list[int]:
        return counts

    def weight(self, w_LKN: Tensor) -> Weight:
        return Weight(Matrices(w_LKN, "NN"), Matrices(w_LKN, "TN"))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Tensor:
        return x_RK.contiguous() if row_R is None else x_RK.index_select(0, row_R)

    def product(self, x_RK: Tensor, w_LKN: Matrices, groups: list[int], dtype: torch.dtype) -> Tensor:
        w = w_LKN.w_LKN
        y_RN = x_RK.new_empty((len(x_RK), w.shape[2 if w_LKN.layout == "NN" else 1]), dtype=dtype)
        if len(x_RK):
            layout = w_LKN.layout
            self._multiply([*w.unbind(0)], [*x_RK.split(groups)], [y_RN], groups, layout=layout, single_output=True)
        return y_RN

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None) -> Tensor:
        return _values(self.activations.activate(h_RGF, name, keep_RF))

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        a_RF, dh_RN, _ = self.activations.activate_back(h_RGF, da_RF, name, keep_RF)
        return a_RF, dh_RN, dh_RN

    def columns(self, x_RK: Tensor, groups: list[int], row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        return (x_RK,) if row_R is None else (x_RK, row_R)

    def weight_gradient(
        self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: list[int], w: Tensor
    ) -> Tensor:
        main, dw = main_gradient(w), torch.empty_like(w, memory_format=torch.contiguous_format)
        if not len(dy_RN[0]):
            return dw.zero_()
        into = dw if main is None else main
        rows = [*self.rows(*x_RK).split(groups)]
        above = [*dy_RN[0].contiguous().split(groups)]
        out = [*into.view(len(groups), rows[0].shape[1], above[0].shape[1]).unbind(0)]
        self._multiply(above, rows, out, groups, layout="NT", grad=True, accumulate=main is not None)
        return dw


def _values(operand: Any) -> Tensor:
    """Of a left operand, which Triton's backend wraps."""
    return operand if isinstance(operand, Tensor) else operand.values
