"""`python -m tests.ops.ahead_of_time CAPABILITY...`: compiles every kernel as it is launched, without a
GPU, and prints for each what its machine code holds, as one JSON object. In a process of its own, because Triton
decides at import whether it interprets."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ops.triton import (
    activations,
    adamw,
    cross_entropy,
    fp8_cast,
    grouped_gemm,
    permute,
    rms_norm,
    rotary,
    router,
    tiling,
)

BF16, FP8, FP32, INT = "*bf16", "*fp8e4nv", "*fp32", "*i32"
HERE = torch.device("cpu")
"""Tiles are those of Hopper where no GPU says otherwise."""


def product(
    operand: str, *, described: bool, columns_first: bool, scales: str = "none", **options: int | bool
) -> tuple:
    tile = tiling.product_tile(HERE, operand == FP8, described)
    kinds = {"x_ptr": operand, "w_ptr": operand}
    if described:
        blocks = (tile["BM"], tile["BK"]), (tile["BN"], tile["BK"]) if columns_first else (tile["BK"], tile["BN"])
        kinds = {name: f"tensordesc<{operand[1:]}[{a}, {b}]>" for name, (a, b) in zip(kinds, blocks, strict=True)}
    pointers = {**kinds, "y_ptr": BF16, "tiles_ptr": INT, "row_ptr": "*i64", "x_scale_ptr": FP32, "w_scale_ptr": FP32}
    defaults = {"GROUP": 8, "GATHER": False, "SCALES": scales, "num_warps": 8, **tile}
    defaults |= {"DESCRIPTORS": described, "COLUMNS_FIRST": columns_first}
    return (
        grouped_gemm.grouped_product,
        pointers,
        {**defaults, "stride_wk" if columns_first else "stride_wn": 1, **options},
    )


def gradient(operand: str, target: str, **options: int | bool) -> tuple:
    pointers = {"x_ptr": operand, "dy_ptr": operand, "dw_ptr": target, "starts_ptr": INT}
    scales = dict.fromkeys(("x_scale_ptr", "dy_scale_ptr"), FP32)
    narrow = operand == FP8
    defaults = {"num_warps": 8, "GROUP": 8, "ADD": True, "FP8": narrow, **tiling.gradient_tile(HERE, narrow)}
    return grouped_gemm.grouped_weight_gradient, pointers | scales, {**defaults, **options}


def routed(kernel, experts: int, top_k: int, **options: bool) -> tuple:
    """Of sigmoids: that has the most to keep at hand."""
    names = ("logits", "bias", "gates", "sums", "dgates", "dprobs", "dz", "dlogits")
    pointers = {**{f"{name}_ptr": FP32 for name in names}, "padding_ptr": "*i1", "experts_ptr": "*i64", "scale": "fp32"}
    rule = {"SIGMOID": True, "AFTER": False, "RENORMALIZE": True, **options}
    return kernel, pointers, {"K": top_k, **rule, **router.launch(experts, top_k)}


ROUND = {"BR": 16, "BLOCK": 128}
SWIGLU = {"KIND": "silu", "G": 2, "DROP": True, "ROUND": True, "num_warps": 8, **ROUND}
ACTIVATED = {"h_ptr": BF16, "keep_ptr": BF16, "q_ptr": FP8, "scale_ptr": FP32}
# As ops/triton/gemm_backend.py launches them. Strides of 1 are constants, which is how Triton's launcher treats them.
KERNELS = {
    "product bf16": product(BF16, described=True, columns_first=False),
    "product bf16 back": product(BF16, described=True, columns_first=True),
    "product bf16 without descriptors": product(BF16, described=False, columns_first=False),
    "product bf16 of gathered rows": product(BF16, described=False, columns_first=False, GATHER=True),
    "product fp8": product(FP8, described=True, columns_first=True, scales="blocks", stride_x_scale_r=1),
    "product fp8 of gathered rows": product(FP8, described=False, columns_first=True, scales="blocks", GATHER=True),
    "product fp8 rowwise": product(FP8, described=True, columns_first=True, scales="rows"),
    "gradient bf16": gradient(BF16, FP32, stride_xk=1, stride_dyn=1),
    "gradient bf16 returned": gradient(BF16, BF16, ADD=False, stride_xk=1, stride_dyn=1),
    "gradient fp8": gradient(FP8, FP32, stride_xr=1, stride_dyr=1),
    "round rows": (fp8_cast.round_rows, {"x_ptr": BF16, "q_ptr": FP8, "scale_ptr": FP32}, ROUND),
    "round columns": (
        fp8_cast.round_columns,
        {"x_ptr": BF16, "q_ptr": FP8, "scale_ptr": FP32, "row_ptr": "*i64", "tiles_ptr": INT},
        {"GATHER": True, "BLOCK": 128, "BK": 64},
    ),
    "round weight": (
        fp8_cast.round_weight,
        {"w_ptr": BF16, "q_ptr": FP8, "qt_ptr": FP8, "scale_ptr": FP32},
        {"BLOCK": 128, "stride_wn": 1, "num_warps": 8},
    ),
    "swiglu": (activations.activate, {"a_ptr": FP8, **ACTIVATED}, SWIGLU),
    "swiglu back": (activations.activate_back, {"da_ptr": BF16, "a_ptr": BF16, "dh_ptr": BF16, **ACTIVATED}, SWIGLU),
    "cross-entropy": (
        cross_entropy.cross_entropy_sums,
        {"logits_ptr": BF16, "labels_ptr": "*i64", "largest_ptr": FP32, "sum_ptr": FP32, "label_ptr": FP32},
        {"BLOCK": 4096, "num_warps": 8},
    ),
    "cross-entropy back": (
        cross_entropy.cross_entropy_gradient,
        {"logits_ptr": BF16, "labels_ptr": "*i64", "largest_ptr": FP32, "sum_ptr": FP32, "grad_ptr": FP32},
        {"BLOCK": 4096, "num_warps": 8},
    ),
    "gather rows": (
        permute.gather_rows,
        {"source_ptr": BF16, "choice_ptr": "*i64", "gates_ptr": FP32, "out_ptr": BF16},
        {"K": 2, "GATED": True, "BLOCK": 1024},
    ),
    "add rows": (
        permute.add_rows,
        {"rows_ptr": BF16, "slot_ptr": "*i64", "gates_ptr": FP32, "out_ptr": BF16},
        {"K": 8, "GATED": True, "BLOCK": 1024},
    ),
    "gate gradient": (
        permute.gate_gradient,
        {"rows_ptr": BF16, "slot_ptr": "*i64", "grad_ptr": BF16, "out_ptr": FP32},
        {"K": 2, "BLOCK": 1024},
    ),
    "router": routed(router.route_forward, 128, 8, BIASED=True, PADDED=True),
    "router, many": routed(router.route_forward, router.LARGEST, 16, BIASED=True, PADDED=True),
    "router back": routed(router.route_backward, 128, 8),
    "adamw": (
        adamw.adamw,
        {"weight_ptr": FP32, **dict.fromkeys(("gradient_ptr", "m_ptr", "v_ptr", "model_ptr"), BF16)}
        | dict.fromkeys(("N", "first"), "i64")
        | dict.fromkeys(("inner1", "skipped1", "first1", "inner2", "skipped2", "first2"), "i64")
        | dict.fromkeys(("grad_scale", "step_size", "decay", "root2", "eps"), "fp32")
        | dict.fromkeys(("beta1", "rest1", "beta2", "rest2"), "fp32"),
        {"HAS_MODEL": True, "BLOCK": adamw.BLOCK, "num_warps": 4},
    ),
    "rotary": (
        rotary.rotate,
        {"x_ptr": BF16, "cos_ptr": FP32, "sin_ptr": FP32, "out_ptr": BF16}
        | dict.fromkeys(("x_s", "x_b", "x_h", "out_s", "out_b", "out_h"), "i64"),
        {"BACKWARD": False, "HEADS": rotary.HEADS, "BLOCK": 64, "x_n": 1, "out_n": 1},
    ),
    "norm": (
        rms_norm.rms_norm_forward,
        {"x_ptr": BF16, "weight_ptr": BF16, "y_ptr": BF16, "scale_ptr": FP32, "eps": "fp32"},
        {"BLOCK": 4096, "num_warps": 8},
    ),
    "norm back": (
        rms_norm.rms_norm_backward,
        {**dict.fromkeys(("x_ptr", "weight_ptr", "dy_ptr", "dx_ptr"), BF16), "scale_ptr": FP32, "parts_ptr": FP32},
        {"BLOCK": 4096, "num_warps": 8},
    ),
}


def compiled(kernel, pointers: dict[str, str], options: dict, capability: int) -> dict[str, int]:
    """Counts of machine instructions, and bytes of shared memory."""
    launch = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
    constants = {key: value for key, value in options.items() if key not in launch}
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    # Pointers, widths and strides of real models are multiples of 16.
    even = [
        name
        for name, kind in kinds.items()
        if kind not in ("constexpr", "fp32") and "num_" not in name and "[" not in kind
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
        code = subprocess.run([tool, binary], capture_output=True, text=True, check=True).stdout
    patterns = {
        "wgmma bf16": r"\bHGMMA",
        "wgmma fp8": r"\bQGMMA",
        "tcgen05": r"\bUTC(?:H|Q)MMA",
        "older tensor core": r"\b(?:HMMA|QMMA)",
        "asynchronous copies": r"\b(?:LDGSTS|UTMALDG)",
        "spills": r"\b(?:LDL|STL)",
    }
    return {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()} | {
        "shared": built.metadata.shared
    }


def main() -> None:
    assert not os.environ.get("TRITON_INTERPRET")
    report = {c: {name: compiled(*case, int(c)) for name, case in KERNELS.items()} for c in sys.argv[1:]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
