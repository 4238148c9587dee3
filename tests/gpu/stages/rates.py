"""How fast this card is at every size that a plan needs: dense and grouped products, FP8, attention, the optimizer and
passes over memory. `python -m benchmarks.rates` makes a table of them for conf/cluster.

Legend: R rows of all experts, K inner and N outer dimension, L experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.gpu.stages.common import DEVICE, REHEARSE, attempt, bf16, in_a_line

TOKENS = (64, 128) if REHEARSE else (512, 1024, 2048, 4096, 8192, 16384)
DENSE = [(64, 64)] if REHEARSE else [
    (1024, 1024), (2048, 1024), (2048, 2048), (2048, 5120), (4096, 2048), (4096, 4096), (4096, 6144),
    (4096, 14336), (4096, 28672), (14336, 4096), (7168, 2112), (1536, 24576), (16384, 7168), (7168, 36864),
    (18432, 7168), (2048, 32000), (4096, 32000), (2048, 151936),
]  # fmt: skip
"""(K, N): projections, feed-forward layers and output layers of published models and their shards."""
GROUPED = [(2, 64, 64)] if REHEARSE else [
    (2, 4096, 28672), (2, 14336, 4096), (8, 4096, 28672), (8, 14336, 4096), (8, 4096, 7168), (8, 3584, 4096),
    (8, 7168, 4096), (8, 2048, 7168), (16, 2048, 1536), (16, 768, 2048), (16, 4096, 3072), (16, 1536, 4096),
    (64, 2048, 2048), (64, 1024, 2048), (128, 2048, 1536), (128, 768, 2048),
]  # fmt: skip
"""(L, K, N) of a rank's experts."""
ROWS = (32, 64) if REHEARSE else (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Per expert."""
HEADS = [(2, 64, 64)] if REHEARSE else [(32, 128, 128), (16, 192, 128), (64, 64, 64)]
"""(heads, width of queries and keys, width of values)."""


def milliseconds(step: Callable[[], object], repetitions: int = 5) -> float:
    """Mean of some calls in a row, after two that do not count."""
    for _ in range(2):
        step()
    if DEVICE.type != "cuda":
        return 0.0
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repetitions):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repetitions


def tried(step: Callable[[], object]) -> float | str:
    try:
        return milliseconds(step)
    except Exception as error:
        return in_a_line(error)[:80]


def dense() -> dict[str, object]:
    rows = []
    for k, n in DENSE:
        w = bf16(k, n)
        for tokens in TOKENS:
            if tokens * n > 2**30:
                continue
            x, dy = bf16(tokens, k), bf16(tokens, n)
            rows.append(
                [tokens, k, n, *map(milliseconds, (lambda: x @ w, lambda: dy @ w.t(), lambda: x.t() @ dy))]  # noqa: B023
            )
    return {"columns": ["M", "K", "N", "forward", "input_gradient", "weight_gradient"], "rows": rows}


def linear_fp8() -> dict[str, object]:
    """The three products of a linear layer with its casts: blockwise, weight gradient in bf16."""
    from ops.fp8_numerics import RECIPES
    from ops.triton.scaled_mm import ScaledMmBackend

    gemm, rows = ScaledMmBackend(RECIPES["blockwise"]), []
    for k, n in DENSE:
        if k % 512 or n % 512 or n > 40000:
            continue
        w = gemm.weight(bf16(1, k, n))
        for tokens in TOKENS:
            groups = gemm.groups([tokens], DEVICE)
            x, dy = bf16(tokens, k), bf16(tokens, n)

            def forward() -> object:
                return gemm.product(gemm.rows(x), w.forward, groups, torch.bfloat16)  # noqa: B023

            def back() -> object:
                return gemm.product(gemm.rows(dy), w.back, groups, torch.bfloat16)  # noqa: B023

            rows.append([tokens, k, n, tried(forward), tried(back)])
    return {"columns": ["M", "K", "N", "forward", "input_gradient"], "rows": rows}


def grouped() -> dict[str, object]:
    rows = []
    for experts, k, n in GROUPED:
        w = bf16(experts, k, n)
        for each in ROWS:
            total = experts * each
            if total * max(k, n) > 2**30:
                continue
            x, dy = bf16(total, k), bf16(total, n)
            ends = torch.arange(each, total + 1, each, dtype=torch.int32, device=DEVICE)
            steps = (
                lambda: F.grouped_mm(x, w, offs=ends),  # noqa: B023
                lambda: F.grouped_mm(dy, w.transpose(1, 2), offs=ends),  # noqa: B023
                lambda: F.grouped_mm(x.t(), dy, offs=ends),  # noqa: B023
            )
            rows.append([experts, each, k, n, *map(tried, steps)])
    return {"columns": ["L", "rows", "K", "N", "forward", "input_gradient", "weight_gradient"], "rows": rows}


def grouped_fp8() -> dict[str, object]:
    """Our own blockwise products without the casts, and torch's rowwise ones."""
    from torch.nn.functional import ScalingType

    from ops.fp8_numerics import RECIPES
    from ops.triton.gemm_backend import Float8GemmBackend

    gemm, rows, row = Float8GemmBackend(RECIPES["blockwise"]), [], ScalingType.RowWise
    for experts, k, n in GROUPED:
        w_LKN = bf16(experts, k, n)
        w = gemm.weight(w_LKN)
        narrow = w_LKN.transpose(1, 2).contiguous().to(torch.float8_e4m3fn).transpose(1, 2)
        w_scale = torch.ones(experts, n, device=DEVICE)
        for each in ROWS[2:]:
            total = experts * each
            if total * max(k, n) > 2**30:
                continue
            groups, x_RK = gemm.groups([each] * experts, DEVICE), bf16(total, k)
            x, x8, x_scale = gemm.rows(x_RK), x_RK.to(torch.float8_e4m3fn), torch.ones(total, device=DEVICE)
            ends = torch.arange(each, total + 1, each, dtype=torch.int32, device=DEVICE)
            options = {"offs": ends, "output_dtype": torch.bfloat16}
            rows.append(
                [
                    experts,
                    each,
                    k,
                    n,
                    tried(lambda: gemm.product(x, w.forward, groups, torch.bfloat16)),  # noqa: B023
                    tried(lambda: F.scaled_grouped_mm(x8, narrow, x_scale, row, w_scale, row, **options)),  # noqa: B023
                ]
            )
    return {"columns": ["L", "rows", "K", "N", "ours", "torch_rowwise"], "rows": rows}


def attention() -> dict[str, object]:
    rows = []
    for heads, width, values in HEADS:
        for sequence in (64,) if REHEARSE else (1024, 2048, 4096, 8192, 16384, 32768):
            batch = max(1, 8192 // sequence)
            q, k = (bf16(batch, heads, sequence, width, seed=s).requires_grad_() for s in (1, 2))
            v = bf16(batch, heads, sequence, values, seed=3).requires_grad_()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            d = torch.randn_like(out)
            forward = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3)  # noqa: B023
            back = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), d, retain_graph=True), 3)  # noqa: B023
            rows.append([batch, heads, width, values, sequence, forward, back])
    return {"columns": ["batch", "heads", "qk", "v", "sequence", "forward", "backward"], "rows": rows}


def memory() -> dict[str, object]:
    sizes = (2**16,) if REHEARSE else tuple(2**n for n in range(16, 33, 2))
    rows = []
    for size in sizes:
        source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        rows.append([2 * size, milliseconds(lambda: target.copy_(source), 10)])  # noqa: B023
    return {"columns": ["bytes", "milliseconds"], "rows": rows}


def optimizer() -> dict[str, object]:
    """torch's fused AdamW, fp32 states, and a copy of the result to bf16."""
    count = 2**12 if REHEARSE else 2**28
    weight = torch.zeros(count, device=DEVICE, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    adamw = torch.optim.AdamW([weight], fused=DEVICE.type == "cuda")
    narrow = torch.empty(count, dtype=torch.bfloat16, device=DEVICE)
    return {
        "parameters": count,
        "adamw": milliseconds(adamw.step),
        "copy_to_bf16": milliseconds(lambda: narrow.copy_(weight.detach())),
        "norm": milliseconds(lambda: weight.grad.norm()),
        "zero": milliseconds(lambda: weight.grad.zero_()),
    }


def main() -> None:
    for measure in (memory, optimizer, dense, linear_fp8, grouped, grouped_fp8, attention):
        attempt(measure.__name__, measure)


if __name__ == "__main__":
    main()
