"""Every product of the published models beside dense cuBLAS and torch's own grouped ones, and what is bound by memory
beside a copy, timed in turns.

Legend: R rows of all experts, K inner and N outer dimension, L experts.
"""

from collections.abc import Callable

import torch

from benchmarks import kernels
from tests.gpu.stages.cases import SHAPES
from tests.gpu.stages.common import DEVICE, REHEARSE, attempt, bf16, in_a_line, seconds

ROWS = 64 if REHEARSE else 16384
"""Of all experts of a rank."""


def timed(entries: kernels.Benchmark, flops: float) -> dict[str, object]:
    """TFLOP/s of each contender and its ratio to the first, which does as much arithmetic; None where it fails."""
    failed: dict[str, str] = {}
    able: dict[str, Callable[[], object]] = {}
    for name, step in entries.items():
        try:
            step()
            able[name] = step
        except Exception as error:
            failed[name] = in_a_line(error)
    took = seconds(able, repetitions=10)
    dense = next(iter(took.values()))
    return {
        "tflops": {name: flops / s / 1e12 for name, s in took.items()},
        "ratio": {name: dense / s for name, s in took.items()},
        "failed": failed,
    }


def products(model: str, direction: str) -> dict[str, object]:
    experts, hidden, width = SHAPES[model]
    inner, outer = (hidden, width) if direction == "up" else (width, hidden)
    rows = ROWS // experts
    entries = kernels.products(experts, rows, inner, outer, DEVICE)
    if REHEARSE:
        entries = {name: step for name, step in entries.items() if not name.startswith("torch scaled")}
    return {"experts": experts, "rows": rows, "K": inner, "N": outer} | timed(
        entries, 2 * experts * rows * inner * outer
    )


def whole_experts(model: str) -> dict[str, object]:
    experts, hidden, width = SHAPES[model]
    rows = ROWS // experts
    entries = kernels.whole_experts(experts, rows, hidden, width, DEVICE)
    return timed(entries, 3 * 2 * 3 * experts * rows * hidden * width)


def in_place(model: str) -> dict[str, object]:
    experts, hidden, width = SHAPES[model]
    return timed(kernels.in_place(experts, ROWS // experts, hidden, width, DEVICE), 2 * ROWS * hidden * width)


def linear(model: str) -> dict[str, object]:
    _, hidden, _ = SHAPES[model]
    return timed(kernels.linear_layers(ROWS, hidden, hidden, DEVICE), 2 * ROWS * hidden * hidden)


def memory_bound() -> dict[str, object]:
    """GB/s of what is read and written at least, beside those of a copy."""
    from ops.activations import activate
    from ops.fp8_numerics import RECIPES
    from ops.rotary import apply_rotary
    from ops.triton.gemm_backend import Float8GemmBackend, TritonGemmBackend
    from ops.triton.permute import PERMUTATION
    from ops.triton.rms_norm import rms_norm
    from ops.triton.rotary import apply_rotary as rotate

    tokens, hidden, width = (32, 128, 128) if REHEARSE else (16384, 4096, 4096)
    x, h, weight = bf16(tokens, hidden), bf16(tokens, 2, width), bf16(hidden)
    choice = torch.randperm(tokens, device=DEVICE)
    fp8, target = Float8GemmBackend(RECIPES["blockwise"]), torch.empty_like(x)
    moved = x.numel() * 2
    heads, turned = x.view(tokens, 1, -1, 128), torch.empty_like(x).view(tokens, 1, -1, 128)
    angle = torch.rand(tokens, 1, 1, 64, device=DEVICE)
    steps = {
        "copy": (lambda: target.copy_(x), 2 * moved),
        "round rows to FP8": (lambda: fp8.rows(x), 1.5 * moved),
        "RMSNorm": (lambda: rms_norm(x, weight, 1e-6), 2 * moved),
        "rotary": (lambda: rotate(heads, angle, angle, turned), 2 * moved),
        "rotary, torch": (lambda: apply_rotary(heads, angle, angle, turned), 2 * moved),
        "gather rows": (lambda: PERMUTATION.permute(x, choice, 1, False), 2 * moved),
        "SwiGLU": (lambda: TritonGemmBackend().activate(h, "swiglu"), 1.5 * h.numel() * 2),
        "SwiGLU and FP8": (lambda: fp8.activate(h, "swiglu"), 1.25 * h.numel() * 2),
        "SwiGLU, torch": (lambda: activate(h.unbind(1), "swiglu"), 1.5 * h.numel() * 2),
    }
    took = seconds({name: step for name, (step, _) in steps.items()})
    speed = {name: steps[name][1] / s / 1e9 for name, s in took.items()}
    return {"gb_per_s": speed, "ratio": {name: s / speed["copy"] for name, s in speed.items()}}


def main() -> None:
    for model in SHAPES:
        for direction in ("up", "down"):
            attempt(f"{model}, {direction}", lambda m=model, d=direction: products(m, d))
    for model in SHAPES:
        attempt(f"{model}, whole experts", lambda m=model: whole_experts(m))
    first = next(iter(SHAPES))
    attempt(f"{first}, rows in place", lambda: in_place(first))
    attempt(f"{first}, linear layers", lambda: linear(first))
    attempt("memory-bound", memory_bound)


if __name__ == "__main__":
    main()
