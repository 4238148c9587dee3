"""Triton's interpreter with the arithmetic of a GPU. As it comes it multiplies the raw bits of bf16 operands, cuts fp32
down to bf16 and rounds to FP8 wrongly (3.6 and 3.9). Only for tests; on a GPU the kernels run as they are."""

import numpy as np
import torch
from triton.runtime import interpreter

TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
BITS = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16), 32: (np.uint32, torch.int32)}
RANGE = {"fp8e4nv": 448.0, "fp8e5": 57344.0}

_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _decode(data: np.ndarray, kind) -> torch.Tensor:
    bits = np.ascontiguousarray(data).view(BITS[kind.primitive_bitwidth][0])
    return torch.from_numpy(bits.copy()).view(TYPES[str(kind)])


def convert(data, source, target, rounding):
    """To the nearest, ties to even; FP8 saturates, as PTX's cvt.rn.satfinite does."""
    nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if str(source) not in TYPES or str(target) not in TYPES or not nearest:
        return _convert(data, source, target, rounding)
    x = _decode(data, source).float()
    if str(target) in RANGE:
        x = x.clamp(-RANGE[str(target)], RANGE[str(target)])
    to_numpy, to_torch = BITS[target.primitive_bitwidth]
    return x.to(TYPES[str(target)]).view(to_torch).numpy().view(to_numpy).reshape(np.shape(data))


def dot(self, a, b, acc, *rest):
    """Products of bf16 and FP8 added up in fp32."""
    if not any(str(x.dtype.scalar) in ("bf16", "fp8e4nv", "fp8e5") for x in (a, b)):
        return _dot(self, a, b, acc, *rest)
    x, y = (_decode(t.data, t.dtype.scalar).float() for t in (a, b))
    return interpreter.TensorHandle((x @ y).numpy().astype(acc.data.dtype) + acc.data, acc.dtype.scalar)


def install() -> None:
    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert, dot
