"""The update of a block of a parameter's elements: in fp32, of weights, moments and gradients that may be bf16.

Moments in bf16 are rounded stochastically: with beta2 = 0.999 an update is less than half a bf16 step, and rounded to
nearest it would be lost.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.optimizers import Optimizer, Update


@dataclass(frozen=True)
class Block:
    """Consecutive elements of a parameter, all on the device that computes. All but the gradient are changed in
    place."""

    weight: Tensor
    """Master weights, fp32 [n]."""
    gradient: Tensor
    """fp32 or bf16 [n]."""
    state: dict[str, Tensor]
    """fp32 or bf16 [n] of each name in Optimizer.state."""
    model_weight: Tensor | None
    """bf16 [n]; None if the master weights are the model's."""
    grad_scale: float
    """Factor that the gradient is multiplied by, in fp32."""
    seed: int
    """rounding_seed of the parameter and the step."""
    first: int
    """Index of the first element in this rank's flattened parameter."""
    index_steps: Sequence[tuple[int, int, int]]
    """Sharding.index_steps: from there to the index in the logical parameter."""
    step: int
    """Counted from 1."""
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


UpdateBlock = Callable[[Block], None]


def in_torch(optimizer: Optimizer) -> UpdateBlock:
    """The update in plain PyTorch, for any optimizer; AdamW has the arithmetic of torch's fused AdamW."""

    def update(block: Block) -> None:
        gradient = block.gradient.float()
        if block.grad_scale != 1.0:
            gradient = gradient * block.grad_scale
        state = {name: kept.float() for name, kept in block.state.items()}  # itself, where it is fp32
        settings = {name: getattr(block, name) for name in ("step", "lr", "weight_decay", "betas", "eps")}
        optimizer.update(Update(block.weight, gradient, state, **settings))
        bits: Tensor | None = None
        for shift, (name, kept) in zip((0, 16), block.state.items(), strict=False):
            if kept.dtype == torch.bfloat16:
                bits = random_bits(block) if bits is None else bits
                kept.copy_(round_to_bf16(state[name], bits >> shift))
        if block.model_weight is not None:
            block.model_weight.copy_(block.weight)

    return update


def rounding_seed(name: str, step: int) -> int:
    """int32: a hash of a logical parameter's name and the step."""
    return int.from_bytes(hashlib.blake2b(repr((name, step)).encode(), digest_size=4).digest(), "little", signed=True)


def random_bits(block: Block) -> Tensor:
    """int32 [n]: 32 random bits for each element. They are a hash of (parameter name, step, index in the logical
    parameter), so that replicas of a parameter get the same bits under every layout."""
    index = torch.arange(block.first, block.first + len(block.gradient), device=block.gradient.device)
    for inner, skipped, first in block.index_steps:
        index += index // inner * skipped + first
    # lowbias32 of C. Wellons' hash prospector. Integers wrap around; torch's right shift is arithmetic.
    bits = index.to(torch.int32)  # the lower 32 bits
    bits ^= block.seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        bits *= factor
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """Stochastic rounding of fp32 to one of the two nearest bf16 values, with expected value x. Exact for bf16 values.

    Args:
        bits: int32; the lower 16 bits are random.
    """
    # A bf16 value is the upper half of an fp32 one.
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000).view(torch.float32).to(torch.bfloat16)
