"""Rotary positions and causal attention in C++ (attention.cpp).

Legend: B batch, H heads, G key/value groups, S sequence, N width of a head.
"""

import ctypes
import math
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.cpp.build import call, data_of, library, threads


class _Shape(ctypes.Structure):
    _fields_ = [*((name, c_int64) for name in "BHGSN"), ("scale", c_float)]


class _View(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


def _view(t_BHSN: Tensor) -> "ctypes._Pointer[_View]":  # pyright: ignore[reportPrivateUsage]
    assert t_BHSN.device.type == "cpu" and t_BHSN.dtype == torch.bfloat16
    assert t_BHSN.dim() == 4 and t_BHSN.stride(3) == 1
    return ctypes.pointer(_View(t_BHSN.data_ptr(), *t_BHSN.stride()[:3]))


def _shape(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> "ctypes._Pointer[_Shape]":  # pyright: ignore[reportPrivateUsage]
    batch, heads, sequence, width = q_BHSN.shape
    assert v_BGSN.shape == k_BGSN.shape == (batch, k_BGSN.shape[1], sequence, width) and heads % k_BGSN.shape[1] == 0
    return ctypes.pointer(_Shape(batch, heads, k_BGSN.shape[1], sequence, width, 1 / math.sqrt(width)))


def _readable(t_BHSN: Tensor) -> Tensor:
    return t_BHSN if t_BHSN.stride(3) == 1 else t_BHSN.contiguous()


def _like(t_BHSN: Tensor) -> Tensor:
    """Room in which a token's heads lie side by side, as projections want them."""
    b, h, s, n = t_BHSN.shape
    return t_BHSN.new_empty((s, b, h, n)).permute(1, 2, 0, 3)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> Tensor:
        q_BHSN, k_BGSN, v_BGSN = (_readable(t) for t in (q_BHSN, k_BGSN, v_BGSN))
        out_BHSN, lse_BHS = _like(q_BHSN), q_BHSN.new_empty(q_BHSN.shape[:3], dtype=torch.float32)
        views = (_view(t) for t in (q_BHSN, k_BGSN, v_BGSN, out_BHSN))
        call(library().switchyard_attention, _shape(q_BHSN, k_BGSN, v_BGSN), *views, data_of(lse_BHS))
        ctx.save_for_backward(q_BHSN, k_BGSN, v_BGSN, out_BHSN, lse_BHS)
        return out_BHSN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BHSN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, out_BHSN, lse_BHS = ctx.saved_tensors
        dout_BHSN, (dq, dk, dv) = _readable(dout_BHSN), (_like(t) for t in inputs)
        views = (_view(t) for t in (*inputs, out_BHSN, dout_BHSN, dq, dk, dv))
        call(library().switchyard_attention_back, _shape(*inputs), *views, data_of(lse_BHS))
        return dq, dk, dv


def causal_attention(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> Tensor:
    """softmax(q k.T / sqrt(N)) v over each query's own position and those before it, in bf16; sums are in fp32. Head h
    looks into group h // (H / G).

    Raises:
        MemoryError: no memory for the blocks of scores.
    """
    return _CausalAttention.apply(q_BHSN, k_BGSN, v_BGSN)


def apply_rotary(x_SBHN: Tensor, cos: Tensor, sin: Tensor, out_SBHN: Tensor, *, backward: bool = False) -> Tensor:
    """ops.rotary.apply_rotary in bf16."""
    x_SBHN, (s, b, h, n) = _readable(x_SBHN), x_SBHN.shape
    assert n % 2 == 0 and cos.shape == sin.shape == (s, b, 1, n // 2) and out_SBHN.shape == x_SBHN.shape
    assert cos.dtype == sin.dtype == torch.float32
    views = [_view(t.permute(1, 2, 0, 3)) for t in (x_SBHN, out_SBHN)]
    library().switchyard_rotate(
        ctypes.pointer(_Shape(b, h, h, s, n, 0)), views[0], data_of(cos), data_of(sin),
        c_float(-1 if backward else 1), views[1], threads(),
    )  # fmt: skip
    return out_SBHN
