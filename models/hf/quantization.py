"""Reads FP8 weights with a scale per block, the format of DeepSeek-V3, as fp32. Other quantised weights are refused.

Legend: R rows, C columns of a weight; a weight may have leading dimensions.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from conf.config_view import format_value
from models.hf.family import HfConfig

KEY = "quantization_config"
FP8 = "F8_E4M3"
_SCALE = "_scale_inv"
_FIXED = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
_NEUTRAL = ("weight_block_size", "modules_to_not_convert", "scale_fmt")
_LOADING = {
    "mxfp4": "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True))",
    "gptq": "from_pretrained, then model.dequantize() where its backend has it",
    "awq": "from_pretrained, then model.dequantize() where its backend has it",
    "bitsandbytes": "from_pretrained, then model.dequantize()",
}
"""How Transformers makes unquantised weights."""


def unsupported(found: Any) -> str | None:
    """Why weights with this quantization_config cannot be imported. None: they can."""
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if not isinstance(method, str):
        return f"{KEY}={format_value(found)}: must be an object with a quant_method, or null"
    if method != "fp8":
        loading = _LOADING.get(method, "from_pretrained, then model.dequantize()")
        return (
            f"{KEY}: weights quantised by {method} are not supported (only fp8 with a scale per block). Import the "
            f"model's unquantised weights, or write them with Transformers: {loading}, then save_pretrained"
        )
    for key, value in found.items():
        if key in _FIXED and value not in _FIXED[key]:
            return f"{KEY}.{key}={format_value(value)}: only {_FIXED[key][0]}"
        if key not in _FIXED and key not in _NEUTRAL and value not in (None, False, "", [], {}):
            return f"{KEY}.{key}={format_value(value)}: unknown key"
    block = found.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return f"{KEY}.weight_block_size={format_value(block)}: must be two positive integers, such as [128, 128]"
    return None


def block_of(config: HfConfig) -> tuple[int, int] | None:
    """(rows, columns) that share a scale. None: the weights are not quantised.

    Args:
        config: config.json, in which `unsupported` found nothing.
    """
    if not config.get(KEY):
        return None
    rows, columns = config[KEY]["weight_block_size"]
    return rows, columns


def scales_of(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], block: tuple[int, int] | None, directory: Path
) -> dict[str, str]:
    """FP8 tensor -> the tensor with its scales.

    Args:
        entries: name -> (safetensors dtype, shape) of every tensor.

    Raises:
        ValueError: a scale is missing, of another shape or type, or without an FP8 weight; or config.json and the
            tensors disagree about whether the weights are quantised.
    """
    found = {name: name + _SCALE for name, (dtype, _) in entries.items() if dtype == FP8}
    scales = set(found.values())
    if block is None:
        if found:
            raise ValueError(f"{directory}: {next(iter(found))} is of type {FP8}, but config.json has no {KEY}")
        return {}
    if not found:
        raise ValueError(f"{directory}: config.json has {KEY}, but no tensor is of type {FP8}: remove the key")
    problems = [f"{name} is missing" for name in sorted(scales - entries.keys())]
    problems += [f"{name} belongs to no FP8 weight" for name in entries if name.endswith(_SCALE) and name not in scales]
    for name, scale in found.items():
        if scale not in entries:
            continue
        (dtype, shape), weight = entries[scale], entries[name][1]
        wanted = scale_shape(weight, block) if len(weight) >= 2 else None
        if shape != wanted:
            problems.append(f"{scale} is {[*shape]} instead of {wanted and [*wanted]}, for {name} {[*weight]}")
        elif dtype not in ("F32", "BF16"):
            problems.append(f"{scale} is of type {dtype} instead of F32 or BF16")
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{directory}: scales of FP8 weights: {'; '.join(problems[:20])}{more}")
    return found


def scale_shape(weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight [..., R, C]."""
    return (*weight[:-2], math.ceil(weight[-2] / block[0]), math.ceil(weight[-1] / block[1]))


def dequantise(weight_RC: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight times its scales, in fp32, block by block (arXiv:2412.19437, section 3.3.2)."""
    rows, columns = block
    values_RC = weight_RC.float()
    for i, row in enumerate(scale.float().unbind(-2)):
        by_column = row.repeat_interleave(columns, -1)[..., None, : values_RC.shape[-1]]
        values_RC[..., i * rows : (i + 1) * rows, :] *= by_column
    return values_RC
