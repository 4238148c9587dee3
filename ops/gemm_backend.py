"""What the experts' products and the Float8 linear layers are made of: a GEMM backend. `Reference` is plain torch, on
any device; ops/triton/gemm_backend.py has the same in Triton.

Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden, G 2 for gated
activations, else 1.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ops.activations import activate, activate_again
from ops.fp8_numerics import Block, Recipe, quantise
from ops.fused_experts import Window, multiply, windows


@dataclass(frozen=True)
class Weight:
    """A weight in the form that the products take."""

    forward: Any
    """For x [R, K] @ w [K, N]."""
    back: Any
    """For dy [R, N] @ w.T [N, K]."""

    def __getitem__(self, experts: slice) -> "Weight":
        return Weight(self.forward[experts], self.back[experts])


class GemmBackend(Protocol):
    """The steps of an expert's layer. Operands are whatever one method returns and the next one takes."""

    def groups(self, counts: list[int], device: torch.device) -> Any:
        """Which rows are whose."""
        ...

    def weight(self, w_LKN: Tensor) -> Weight: ...

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Any:
        """The left operand of `product`: x, or of x [T, K] the rows that row_R names."""
        ...

    def product(self, x_RK: Any, w_LKN: Any, groups: Any, dtype: torch.dtype) -> Tensor:
        """y [R, N]: each row times its expert's weight, added up in fp32."""
        ...

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None) -> Any:
        """a [R, F] = act(h), times keep (dropout) if there is one, as the left operand of `product`."""
        ...

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """(a [R, F] again, the gradient of h [R, G * F] for that of a, the latter again as a left operand). da may be
        overwritten."""
        ...

    def columns(self, x_RK: Tensor, groups: Any, row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        """An operand of `weight_gradient`, as tensors that autograd can keep from forward to backward; with row_R, only
        the first of the two operands, as in `rows`."""
        ...

    def weight_gradient(self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: Any, w: Tensor) -> Tensor:
        """x.T @ dy [L, K, N] of each expert in the shape and the precision of the weight w; zeros where an expert has
        no rows. Where w has an fp32 main gradient it may be added there instead, and a tensor without meaning comes
        back (Megatron-Core's convention: w.grad_added_to_main_grad)."""
        ...


@dataclass
class MainGradientPart:
    """Some experts' part of a weight's main gradient; an attribute of that part of the weight."""

    main_grad: Tensor
    added: bool = False
    """Whether the gradient of the pass was added to it."""


def main_gradient_parts(w: Tensor, parts: int) -> list[MainGradientPart] | None:
    """Of the equal parts of a weight along its experts; None: it has no fp32 main gradient."""
    main = getattr(w, "main_grad", None)
    if main is None or main.dtype != torch.float32 or not hasattr(w, "grad_added_to_main_grad"):
        return None
    return [MainGradientPart(part) for part in main.chunk(parts)]


def main_gradient(w: Tensor) -> Tensor | None:
    """Where the gradient of a weight, or of some experts' part of it, is to be added, in fp32; None: it is to be
    returned, also where gradients are added up in bf16 (optim.grad_dtype). Whoever gets one adds to it: Megatron-Core's
    hook then leaves the returned gradient alone, which only has to exist."""
    part: MainGradientPart | None = getattr(w, "main_gradient_part", None)
    if part is not None:
        part.added = True
        return part.main_grad
    if main_gradient_parts(w, 1) is None:
        return None
    w.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return w.main_grad  # pyright: ignore[reportAttributeAccessIssue]


class Reference:
    """Plain torch, one expert after the other. With a recipe every operand is rounded to FP8 and back: what an FP8
    tensor core multiplies exactly, a bf16 or fp32 product multiplies exactly too."""

    def __init__(self, recipe: Recipe | None = None, *, narrow_weight_gradient: bool = False):
        """Args:
        recipe: None leaves the operands as they are.
        narrow_weight_gradient: round the operands of the weight gradient as well.
        """
        self.recipe, self.narrow_weight_gradient = recipe, narrow_weight_gradient

    def groups(self, counts: list[int], device: torch.device) -> list[Window]:
        return list(windows(counts, rounded=device.type == "cpu"))

    def weight(self, w_LKN: Tensor) -> Weight:
        if self.recipe is None:
            return Weight(w_LKN, w_LKN.transpose(1, 2))
        forward = _rounded(w_LKN, self.recipe.weight)
        same = self.recipe.weight == self.recipe.weight_back
        back = forward if same else _rounded(w_LKN, self.recipe.weight_back)
        return Weight(forward, back.transpose(1, 2))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Tensor:
        x_RK = x_RK if self.recipe is None else _rounded(x_RK, self.recipe.rows)
        return x_RK if row_R is None else x_RK.index_select(0, row_R)

    def product(self, x_RK: Tensor, w_LKN: Tensor, groups: list[Window], dtype: torch.dtype) -> Tensor:
        y_RN = x_RK.new_empty((x_RK.shape[0], w_LKN.shape[2]), dtype=dtype)
        for at, w_KN in zip(groups, w_LKN, strict=True):
            if at.start < at.stop:
                multiply(x_RK[at.first : at.last], w_KN, y_RN, at)
        return y_RN

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None = None) -> Tensor:
        # In fp32 and rounded once, as a kernel does.
        a_RF = activate(h_RGF.float().unbind(1), name)
        return self.rows((a_RF if keep_RF is None else a_RF * keep_RF).to(h_RGF.dtype))

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        keep = 1.0 if keep_RF is None else keep_RF.float()
        a_RF, dh_RN = activate_again(h_RGF.float(), da_RF.float() * keep, name)
        dh_RN = dh_RN.to(h_RGF.dtype)
        return (a_RF * keep).to(h_RGF.dtype), dh_RN, self.rows(dh_RN)

    def columns(self, x_RK: Tensor, groups: list[Window], row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.recipe is None or not self.narrow_weight_gradient:
            return (x_RK,) if row_R is None else (x_RK, row_R)
        x_RK = x_RK if row_R is None else x_RK.index_select(0, row_R)
        # Blocks begin anew with every expert, so that no row is scaled by another expert's.
        return (torch.cat([_rounded(x_RK[at.start : at.stop], self.recipe.columns) for at in groups]),)

    def weight_gradient(
        self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: list[Window], w: Tensor
    ) -> Tensor:
        (left_RK, *row_R), (right_RN,) = x_RK, dy_RN
        left_RK = left_RK.index_select(0, *row_R) if row_R else left_RK
        dw_LKN = w.new_zeros((len(groups), left_RK.shape[1], right_RN.shape[1]))
        for at, dw_KN in zip(groups, dw_LKN, strict=True):
            if at.start < at.stop:
                # Of the window's rows only the expert's own count.
                x = torch.zeros_like(left_RK[at.first : at.last])
                x[at.start - at.first : at.stop - at.first] = left_RK[at.start : at.stop]
                torch.mm(x.t(), right_RN[at.first : at.last], out=dw_KN)
        return dw_LKN.view(w.shape)


def _rounded(x: Tensor, block: Block) -> Tensor:
    return quantise(x, block).dequantise(x.dtype)
