"""A stand-in for torch.nn.functional.scaled_mm on a GPU: it refuses what torch 2.13 and cuBLASLt refuse there or,
worse, multiply wrongly, and computes the rest in fp32.

Legend: M rows, K inner and N outer dimension of the product.
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

S, FP8, BLOCK = ScalingType, torch.float8_e4m3fn, 128
PAIRS = [
    (S.TensorWise, S.TensorWise),
    (S.RowWise, S.RowWise),
    (S.BlockWise1x128, S.BlockWise128x128),
    (S.BlockWise1x128, S.BlockWise1x128),
]


class OnGPU:
    """scaled_mm on a GPU of a compute capability; called as that function is."""

    def __init__(self, capability: tuple[int, int] = (9, 0), factor: float = 1.0):
        """factor: a product that is wrong by it."""
        self.capability, self.factor, self.calls = capability, factor, 0

    def __call__(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        scale_a: Tensor,
        scale_recipe_a: ScalingType,
        scale_b: Tensor,
        scale_recipe_b: ScalingType,
        *,
        output_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        self.calls += 1
        (m, k), n, kinds = mat_a.shape, mat_b.shape[1], (scale_recipe_a, scale_recipe_b)
        assert mat_b.shape[0] == k and mat_a.dtype == mat_b.dtype == FP8
        assert output_dtype in (torch.bfloat16, torch.float32) and not use_fast_accum
        if not (m and k and n):
            return mat_a.new_zeros((m, n), dtype=output_dtype)
        assert k % 16 == 0 and n % 16 == 0, "sizes must be divisible by 16"
        assert mat_a.stride() == (k, 1), "Hopper takes rows of the left operand"
        assert mat_b.stride() == (1, k), "Hopper takes columns of the right operand"
        assert scale_a.dtype == scale_b.dtype == torch.float32
        for tensor in (mat_a, mat_b, scale_a, scale_b):
            assert tensor.data_ptr() % (16 if tensor.dim() == 2 and tensor.numel() > 1 else 4) == 0
        if S.BlockWise1x128 in kinds or S.BlockWise128x128 in kinds:
            if self.capability[0] != 9:
                raise NotImplementedError("DeepSeek style (1x128, 128x128) scaling only supported in CUDA for SM90")
            # Neither does torch ask for: a precaution of ours (ops.triton.scaled_mm.ALIGNED).
            assert m % 4 == 0 and (S.BlockWise1x128 not in kinds[1:] or n % 4 == 0), "scales start at 16 bytes"
        left = self.spread(scale_a, scale_recipe_a, (m, k))
        if scale_recipe_b is S.RowWise:
            assert scale_b.shape == (1, n) and scale_b.stride(1) == 1
            right = scale_b.expand(k, n)
        else:
            right = self.spread(scale_b, scale_recipe_b, (n, k)).t()
        assert kinds in PAIRS
        return (self.factor * (mat_a.float() * left) @ (mat_b.float() * right)).to(output_dtype)

    def spread(self, scale: Tensor, kind: ScalingType, size: tuple[int, int]) -> Tensor:
        """One scale for each element of an operand whose inner dimension comes second."""
        outer, inner = size
        blocks = -(-inner // BLOCK)
        if kind is S.TensorWise:
            assert scale.numel() == 1
            return scale.reshape(1, 1).expand(size)
        if kind is S.RowWise:
            assert scale.shape == (outer, 1) and scale.is_contiguous() and scale.stride(1) == 1
            return scale.expand(size)
        if kind is S.BlockWise1x128:
            assert scale.shape == (outer, blocks) and scale.stride() == (1, outer)
            return scale.repeat_interleave(BLOCK, 1)[:, :inner]
        assert kind is S.BlockWise128x128
        aligned = -(-blocks // 4) * 4
        assert scale.shape == (aligned, -(-outer // BLOCK)) and scale.stride() == (1, aligned)
        return scale.t().repeat_interleave(BLOCK, 0)[:outer].repeat_interleave(BLOCK, 1)[:, :inner]
