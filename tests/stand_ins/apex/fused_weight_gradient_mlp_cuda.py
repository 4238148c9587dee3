"""Stands for the extension of Apex that adds the gradient of a weight to its main gradient.

Legend: R rows, K inner and N outer dimension of a product.
"""

from torch import Tensor


def wgrad_gemm_accum_fp32(input_RK: Tensor, d_output_RN: Tensor, d_weight_NK: Tensor) -> None:
    d_weight_NK.add_(d_output_RN.t() @ input_RK)


def wgrad_gemm_accum_fp16(input_RK: Tensor, d_output_RN: Tensor, d_weight_NK: Tensor) -> None:
    d_weight_NK.add_(d_output_RN.t() @ input_RK)
