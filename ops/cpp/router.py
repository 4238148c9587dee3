"""The router's product in C++ (router.cpp).

Legend: T tokens, D hidden, E experts.
"""

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.cpp.build import data_of, library, threads


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        assert x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32
        assert x_TD.device.type == "cpu" and x_TD.shape[1] == weight_ED.shape[1]
        x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
        logits_TE = weight_ED.new_empty((len(x_TD), len(weight_ED)))
        library().switchyard_router_logits(
            *map(c_int64, (*x_TD.shape, len(weight_ED))), *map(data_of, (x_TD, weight_ED, logits_TE)), threads()
        )
        ctx.save_for_backward(x_TD, weight_ED)
        return logits_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor]:
        (x_TD, weight_ED), dlogits_TE = ctx.saved_tensors, dlogits_TE.contiguous()
        dx_TD, dweight_ED = torch.empty_like(x_TD), torch.empty_like(weight_ED)
        library().switchyard_router_logits_back(
            *map(c_int64, (*x_TD.shape, len(weight_ED))),
            *map(data_of, (dlogits_TE, x_TD, weight_ED, dx_TD, dweight_ED)), threads(),
        )  # fmt: skip
        return dx_TD, dweight_ED


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """ops.routing.router_logits for tokens in bf16."""
    return _Logits.apply(x_TD, weight_ED)
