"""`python -m benchmarks.kernels`: compares grouped GEMMs, FP8 casts and whole experts with PyTorch's, on a GPU. Figures
are ratios to a dense bf16 product (cuBLAS) with the same FLOPs or, for casts, to a copy of the same size: medians of
alternating measurements in the same process on random data. Above 1 is faster.

Legend: R rows of all experts, K inner and N outer dimension, L experts.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.fp8_numerics import RECIPES
from ops.gemm_backend import GemmBackend

SHAPES = ((8, 2048, 4096, 4096), (64, 256, 2048, 2048))
"""(experts, rows per expert, K, N)."""
Benchmark = dict[str, Callable[[], object]]


def median_seconds(entries: Benchmark, repetitions: int) -> dict[str, float | None]:
    """Median seconds, measured in the order A B C A B C ..., after three warm-up rounds. None: not supported here."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    failed: dict[str, str] = {}
    for repetition in range(repetitions + 3):
        for name, step in entries.items():
            if name in failed:
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
            except Exception as error:
                if not name.startswith(MAY_FAIL):
                    raise
                failed[name] = str(error)
                continue
            if repetition >= 3:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) if times else None for name, times in seconds.items()}


MAY_FAIL = ("torch scaled_grouped_mm", "linear layer, torch scaled_mm")
"""PyTorch's FP8 products, which not every GPU and version supports."""


def products(experts: int, rows: int, inner: int, outer: int, device: torch.device) -> Benchmark:
    """Forward, input gradient and weight gradient, each with the same FLOPs as the dense product."""
    counts, total = [rows] * experts, experts * rows
    x_RK, dy_RN = (torch.randn(total, n, device=device).bfloat16() for n in (inner, outer))
    w_LKN = torch.randn(experts, inner, outer, device=device).bfloat16() * inner**-0.5
    ends = torch.arange(rows, total + 1, rows, dtype=torch.int32, device=device)
    entries: Benchmark = {
        "dense": lambda: x_RK @ w_LKN[0],
        "torch grouped_mm": lambda: F.grouped_mm(x_RK, w_LKN, offs=ends),
    }
    for kind, gemm in _bf16_and_fp8().items():
        entries |= _three_products(kind, gemm, counts, x_RK, dy_RN, w_LKN)
    return entries | _torch_fp8(x_RK, w_LKN, ends)


def _three_products(
    kind: str, gemm: GemmBackend, counts: list[int], x_RK: Tensor, dy_RN: Tensor, w_LKN: Tensor
) -> Benchmark:
    groups, weight = gemm.groups(counts, x_RK.device), gemm.weight(w_LKN)
    x, dy = gemm.rows(x_RK), gemm.rows(dy_RN)
    columns = gemm.columns(x_RK, groups), gemm.columns(dy_RN, groups)
    return {
        f"{kind} forward": lambda: gemm.product(x, weight.forward, groups, torch.bfloat16),
        f"{kind} input gradient": lambda: gemm.product(dy, weight.back, groups, torch.bfloat16),
        f"{kind} weight gradient": lambda: gemm.weight_gradient(*columns, groups, w_LKN),
    }


def in_place(experts: int, rows: int, inner: int, outer: int, device: torch.device) -> Benchmark:
    """Forward product and weight gradient, including the FP8 cast, of tokens that are routed to two experts each: from
    a gathered copy, which is created before the forward product, or read in place."""
    total = experts * rows
    token_R = torch.randperm(total, device=device) // 2
    x_TK = torch.randn(-(-total // 2), inner, device=device).bfloat16()
    dy_RN = torch.randn(total, outer, device=device).bfloat16()
    w_LKN = torch.randn(experts, inner, outer, device=device).bfloat16() * inner**-0.5
    x_RK = x_TK[token_R]
    entries: Benchmark = {"dense": lambda: x_RK @ w_LKN[0]}
    for kind, gemm in _bf16_and_fp8().items():
        entries |= _two_ways(kind, gemm, [rows] * experts, x_TK, token_R, dy_RN, w_LKN)
    return entries


def _two_ways(
    kind: str, gemm: GemmBackend, counts: list[int], x_TK: Tensor, token_R: Tensor, dy_RN: Tensor, w_LKN: Tensor
) -> Benchmark:
    groups, weight, x_RK = gemm.groups(counts, x_TK.device), gemm.weight(w_LKN), x_TK[token_R]
    dy = gemm.columns(dy_RN, groups)

    def forward(x: Tensor, *row_R: Tensor) -> Tensor:
        return gemm.product(gemm.rows(x, *row_R), weight.forward, groups, torch.bfloat16)

    def gradient(x: Tensor, *row_R: Tensor) -> Tensor:
        return gemm.weight_gradient(gemm.columns(x, groups, *row_R), dy, groups, w_LKN)

    return {
        f"{kind} forward, gathered before": lambda: forward(x_TK.index_select(0, token_R)),
        f"{kind} forward, read in place": lambda: forward(x_TK, token_R),
        f"{kind} weight gradient, gathered before": lambda: gradient(x_RK),
        f"{kind} weight gradient, read in place": lambda: gradient(x_TK, token_R),
    }


def _bf16_and_fp8() -> dict[str, GemmBackend]:
    from ops.triton.gemm_backend import Float8GemmBackend, TritonGemmBackend

    return {"bf16": TritonGemmBackend(), "fp8": Float8GemmBackend(RECIPES["blockwise"], narrow_weight_gradient=True)}


def _torch_fp8(x_RK: Tensor, w_LKN: Tensor, ends: Tensor) -> Benchmark:
    from torch.nn.functional import ScalingType

    x, w = x_RK.to(torch.float8_e4m3fn), w_LKN.transpose(1, 2).contiguous().to(torch.float8_e4m3fn).transpose(1, 2)
    x_scale, w_scale = x_RK.new_ones(len(x), dtype=torch.float32), w_LKN.new_ones(w.shape[::2], dtype=torch.float32)
    row, options = ScalingType.RowWise, {"offs": ends, "output_dtype": torch.bfloat16}
    return {
        "torch scaled_grouped_mm, rowwise": lambda: F.scaled_grouped_mm(x, w, x_scale, row, w_scale, row, **options)
    }


def linear_layers(rows: int, inner: int, outer: int, device: torch.device) -> Benchmark:
    """The three products of a blockwise FP8 linear layer, with Triton and with PyTorch's scaled_mm."""
    from ops.triton.gemm_backend import Float8GemmBackend
    from ops.triton.scaled_mm import ScaledMmBackend

    x_RK, dy_RN = (torch.randn(rows, n, device=device).bfloat16() for n in (inner, outer))
    w_LKN = torch.randn(1, inner, outer, device=device).bfloat16() * inner**-0.5
    entries: Benchmark = {"dense": lambda: x_RK @ w_LKN[0]}
    for name, kind in {"Triton": Float8GemmBackend, "torch scaled_mm": ScaledMmBackend}.items():
        gemm = kind(RECIPES["blockwise"], narrow_weight_gradient=True)
        entries |= _three_products(f"linear layer, {name},", gemm, [rows], x_RK, dy_RN, w_LKN)
    return entries


def rounding(total: int, inner: int, device: torch.device) -> Benchmark:
    """The FP8 cast of rows, and a copy that reads and writes the same number of bytes."""
    from ops.triton.gemm_backend import Float8GemmBackend

    gemm, x_RK = Float8GemmBackend(RECIPES["blockwise"]), torch.randn(total, inner, device=device).bfloat16()
    source, target = (torch.empty(total * inner * 3 // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return {"copy": lambda: target.copy_(source), "round rows": lambda: gemm.rows(x_RK)}


def whole_experts(experts: int, rows: int, inner: int, outer: int, device: torch.device) -> Benchmark:
    """Whole SwiGLU experts, forward and backward, including FP8 casts except that of the weights (once per step)."""
    from ops.experts import grouped_experts
    from ops.grouped_mlp import experts_with
    from ops.triton.gemm_backend import Float8GemmBackend, GroupedMmBackend, TritonGemmBackend

    shapes = ((experts * rows, inner), (experts, inner, 2, outer), (experts, outer, inner))
    tensors = [torch.randn(s, device=device).bfloat16().mul_(0.02).requires_grad_() for s in shapes]
    grad = torch.randn_like(tensors[0])

    def step(backend: Callable[..., Tensor]) -> Callable[[], object]:
        x, w_in, w_out = tensors
        return lambda: torch.autograd.grad(backend(x, [rows] * experts, w_in, w_out, "swiglu"), tensors, grad)

    narrow = {
        wgrad: Float8GemmBackend(RECIPES["blockwise"], narrow_weight_gradient=wgrad == "fp8")
        for wgrad in ("bf16", "fp8")
    }
    return {
        "experts, torch grouped_mm": step(grouped_experts),
        "experts, torch grouped_mm, ours else": step(experts_with(GroupedMmBackend())),
        "experts, bf16": step(experts_with(TritonGemmBackend())),
        **{f"experts, fp8, weight gradient {w}": step(experts_with(gemm)) for w, gemm in narrow.items()},
    }


def ratios(seconds: dict[str, float | None]) -> dict[str, float | None]:
    """Speed relative to the first entry."""
    first = next(iter(seconds.values()))
    assert first is not None
    return {name: None if s is None else round(first / s, 3) for name, s in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compares grouped GEMMs and FP8 casts with PyTorch's, on a GPU.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repetitions", type=int, default=30)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels: needs a GPU; on a CPU these kernels are only interpreted")
    device, report = torch.device("cuda"), {}
    for shape in SHAPES:
        parts = (
            products(*shape, device),
            in_place(*shape, device),
            linear_layers(shape[0] * shape[1], *shape[2:], device),
            rounding(shape[0] * shape[1], shape[2], device),
            whole_experts(*shape, device),
        )
        found = [ratios(median_seconds(part, args.repetitions)) for part in parts]
        report["x".join(map(str, shape))] = {name: ratio for part in found for name, ratio in part.items()}
    if not args.json:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; experts x rows x K x N")
        for name, part in report.items():
            print("\n".join([name, *(f"  {entry:40} {ratio}" for entry, ratio in part.items())]))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
