"""The update of a block of weights (parallel/block_update.py) by AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101,
algorithm 2) in Triton: everything is read and written once.

Legend: N elements.
"""

from typing import Any

import triton
import triton.language as tl

from ops.triton.jit import jit
from parallel.block_update import Block

BLOCK = 1024
"""Elements of a program: eight per thread."""
WHOLE = 2**62, 0, 0
"""A step of Sharding.index_steps that changes no index."""


@jit
def _rounded(x, bits, target: tl.constexpr):
    """To the target's type: stochastically to bf16, by the lower 16 of the bits."""
    if target == tl.bfloat16:
        x = ((x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(target)


@jit
def _random_bits(index, seed):
    """block_update.random_bits."""
    bits = index.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


_VARYING = [
    *("N", "first", "seed", "inner1", "skipped1", "first1", "inner2", "skipped2", "first2"),
    *("grad_scale", "step_size", "decay", "root2", "eps"),
]


@jit(do_not_specialize=_VARYING)
def adamw(
    weight_ptr, gradient_ptr, m_ptr, v_ptr, model_ptr,
    N, first, seed, inner1, skipped1, first1, inner2, skipped2, first2,
    grad_scale, step_size, decay, root2, eps, beta1, rest1, beta2, rest2,
    HAS_MODEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """step_size = lr / (1 - beta1^step), root2 = sqrt(1 - beta2^step), decay = lr * weight_decay, rest = 1 - beta."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < N
    weight = tl.load(weight_ptr + at, mask=here)
    gradient = tl.load(gradient_ptr + at, mask=here).to(tl.float32) * grad_scale
    m = tl.load(m_ptr + at, mask=here).to(tl.float32)
    v = tl.load(v_ptr + at, mask=here).to(tl.float32)
    weight -= decay * weight
    m = beta1 * m + rest1 * gradient
    v = beta2 * v + rest2 * gradient * gradient
    weight -= step_size * m / (tl.sqrt(v) / root2 + eps)
    tl.store(weight_ptr + at, weight, mask=here)
    if HAS_MODEL:
        tl.store(model_ptr + at, weight.to(tl.bfloat16), mask=here)
    index = first + at
    index += index // inner1 * skipped1 + first1
    index += index // inner2 * skipped2 + first2
    bits = _random_bits(index, seed)
    tl.store(m_ptr + at, _rounded(m, bits, m_ptr.dtype.element_ty), mask=here)
    tl.store(v_ptr + at, _rounded(v, bits >> 16, v_ptr.dtype.element_ty), mask=here)


def update(block: Block) -> None:
    """parallel.block_update.UpdateBlock of AdamW."""
    count, (beta1, beta2) = len(block.weight), block.betas
    if not count:
        return
    steps = [*block.index_steps, WHOLE, WHOLE]
    assert len(steps) <= 4, "a parameter is sharded along two dimensions at most"
    model: Any = block.weight if block.model_weight is None else block.model_weight
    adamw[(triton.cdiv(count, BLOCK),)](
        block.weight, block.gradient, block.state["exp_avg"], block.state["exp_avg_sq"], model,
        count, block.first, block.seed, *steps[0], *steps[1],
        float(block.grad_scale), block.lr / (1 - beta1**block.step), block.lr * block.weight_decay,
        (1 - beta2**block.step) ** 0.5, block.eps, beta1, 1 - beta1, beta2, 1 - beta2,
        HAS_MODEL=block.model_weight is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
