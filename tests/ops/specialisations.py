"""`python -m tests.ops.specialisations`: for steps of ever other row counts, how many kernels Triton would
compile in each, without a GPU and without launching any. Prints one JSON object: the kernels first asked for in each
step. In a process of its own, because Triton decides at import whether it interprets."""

import json
import os
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ops.fp8_numerics import RECIPES
from ops.grouped_mlp import experts_with
from ops.permute import PermuteIndices
from ops.triton.gemm_backend import Float8GemmBackend, TritonGemmBackend
from ops.triton.permute import PERMUTATION as KERNELS

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
asked: set[tuple[str, str]] = set()


def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """What JITFunction.run looks a compiled kernel up by."""
    binder = create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialisation, chosen = binder(*arguments, **options)
    asked.add((self.fn.__name__, f"{specialisation} {sorted(chosen.items())}"))


def step(counts: list[int], gemm: TritonGemmBackend, generator: torch.Generator) -> None:
    """Forward and backward of a layer of experts whose rows lie elsewhere, and of what brings rows there and back."""
    rows, tokens = sum(counts), 96 + sum(counts)
    x, w_in, w_out = (
        torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((tokens, 256), (len(counts), 256, 2, 128), (len(counts), 128, 256))
    )
    choice_R = torch.randperm(2 * tokens, generator=generator)[:rows]
    y = experts_with(gemm)(x, counts, w_in, w_out, "swiglu", None, None, PermuteIndices(choice_R, 2, KERNELS))
    y.backward(torch.zeros_like(y))
    gathered = KERNELS.permute(x, choice_R, 2, False)
    KERNELS.unpermute(gathered, choice_R, torch.zeros(tokens, 2, requires_grad=True), False).sum().backward()


def main() -> None:
    assert not os.environ.get("TRITON_INTERPRET")
    JITFunction.run = record
    generator = torch.Generator().manual_seed(0)
    told = {}
    recipe = RECIPES["blockwise"]
    for name, gemm in {
        "bf16": TritonGemmBackend(),
        "fp8": Float8GemmBackend(recipe, narrow_weight_gradient=True),
    }.items():
        new = []
        # Multiples of 16 and not, an expert without rows, a single row, one row in all, as many tiles as there are not.
        for counts in ([128, 64, 0], [1, 0, 0], [17, 3, 300], [16, 16, 16], [0, 129, 1000], [5, 700, 1], [0, 0, 2048]):
            before = set(asked)
            step(counts, gemm, generator)
            new.append(sorted(name for name, _ in asked - before))
        told[name] = new
    print(json.dumps(told))


if __name__ == "__main__":
    main()
