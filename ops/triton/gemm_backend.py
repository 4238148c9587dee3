"""The GEMM backend (ops/gemm_backend.py) in Triton: what is launched, on which tensors. Imports Triton, so it is itself
imported only after `ops.gpu.triton_unsupported_reason`.

Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden, G 2 for gated
activations, else 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.fp8_numerics import BLOCK, E4M3, RECIPES, Block, Quantised, Recipe, quantise
from ops.gemm_backend import Weight, main_gradient
from ops.triton import activations, fp8_cast, grouped_gemm
from ops.triton.tiling import ROWS, can_describe, describe, gradient_tile, product_tile, programs

SCALE_ROWS = 16
"""Rows that the scales of 1 x BLOCK have room for a multiple of. Triton compiles a kernel anew for a stride that is no
multiple of 16."""


@dataclass(frozen=True)
class Groups:
    """Whose rows are whose, as the kernels read it. Made on the host, where the counts are."""

    counts: list[int]
    tiles: Tensor
    """int32 [row tiles, 3]: expert, first row, end of the expert's rows."""
    starts: Tensor
    """int32 [L + 1]: first row of each expert."""
    padded_starts: Tensor
    """The same with every expert's rows filled up to a multiple of ROWS."""

    @classmethod
    def of(cls, counts: list[int], device: torch.device) -> "Groups":
        rows_L = np.asarray(counts, dtype=np.int32)
        tiles_L = -(-rows_L // ROWS)
        starts, tiles_before = (np.concatenate(([0], np.cumsum(n))).astype(np.int32) for n in (rows_L, tiles_L))
        expert_t = np.repeat(np.arange(len(counts), dtype=np.int32), tiles_L)
        first_t = starts[expert_t] + ROWS * (np.arange(len(expert_t), dtype=np.int32) - tiles_before[expert_t])
        tiles = np.stack((expert_t, first_t, starts[expert_t + 1]), axis=1).reshape(-1)
        # One copy to the device instead of three. Each part begins at a multiple of 16 bytes: Triton compiles a kernel
        # anew for a pointer that does not.
        parts = starts, ROWS * tiles_before, tiles
        sizes = [len(part) + -len(part) % 4 for part in parts]
        flat = np.zeros(sum(sizes), dtype=np.int32)
        for begin, part in zip((0, sizes[0], 2 * sizes[0]), parts, strict=True):
            flat[begin : begin + len(part)] = part
        of_starts, of_padded, of_tiles = torch.from_numpy(flat).to(device, non_blocking=True).split(sizes)
        edges = len(counts) + 1
        return cls(counts, of_tiles[: len(tiles)].view(-1, 3), of_starts[:edges], of_padded[:edges])


@dataclass(frozen=True)
class Operand:
    """One side of a product."""

    values: Tensor
    scale: Tensor | None = None
    """Of FP8 values."""
    blocks: bool = True
    """Scales for blocks of 128 of the inner dimension, not for all of it."""
    row_R: Tensor | None = None
    """Which rows of the values the operand's are; None: all, in order."""

    def __getitem__(self, experts: slice) -> "Operand":
        """Some of the experts of a weight."""
        return Operand(self.values[experts], None if self.scale is None else self.scale[experts], self.blocks)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class TritonGemmBackend:
    """bf16."""

    def groups(self, counts: list[int], device: torch.device) -> Groups:
        return Groups.of(counts, device)

    def weight(self, w_LKN: Tensor) -> Weight:
        return Weight(Operand(w_LKN), Operand(w_LKN.transpose(1, 2)))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Operand:
        return Operand(_rows_contiguous(x_RK), row_R=row_R)

    def product(self, x_RK: Operand, w_LKN: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
        x, w, row_R = x_RK.values, w_LKN.values, x_RK.row_R
        rows, inner, outer = len(x if row_R is None else row_R), x.shape[1], w.shape[2]
        y_RN = x.new_empty((rows, outer), dtype=dtype)
        if not rows:
            return y_RN
        narrow = x_RK.scale is not None
        scales, strides = (y_RN, y_RN), [0] * 5
        if x_RK.scale is not None:
            assert w_LKN.scale is not None
            scales = (x_RK.scale, w_LKN.scale)
            # Along an axis with a single scale, which all of the axis reads, the stride is 0. Not for a single row: it
            # is row 0, and the stride stays what it is for more.
            axes = [(scale, axis) for scale in scales for axis in range(scale.dim())]
            strides = [
                s.stride(axis) * (s.shape[axis] > 1 or (s is x_RK.scale and axis == 0 and w_LKN.blocks))
                for s, axis in axes
            ]
        kind = "none" if not narrow else "blocks" if w_LKN.blocks else "rows"
        tile = product_tile(x.device, narrow, descriptors=True)
        # The copy engine of Hopper cannot gather.
        described = row_R is None and can_describe(x, w, tile["BK"])
        tile = tile if described else product_tile(x.device, narrow, descriptors=False)
        grouped_gemm.grouped_product[(programs(x.device),)](
            *(describe(x, w, tile) if described else (x, w)), y_RN, *scales,
            groups.tiles if row_R is None else row_R, groups.tiles, len(groups.tiles),
            outer, inner, x.stride(0), *w.stride(), y_RN.stride(0), *strides,
            SCALES=kind, GATHER=row_R is not None, DESCRIPTORS=described, COLUMNS_FIRST=w.stride(1) == 1,
            GROUP=8, num_warps=8, **tile,
        )  # fmt: skip
        return y_RN

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None = None) -> Operand:
        return self._activate(h_RGF, name, keep_RF, narrow=False)

    def _activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None, *, narrow: bool) -> Operand:
        rows, gates, width = h_RGF.shape
        a_RF = h_RGF.new_empty((rows, width), dtype=E4M3 if narrow else h_RGF.dtype)
        scale = _row_scales(h_RGF, rows, width) if narrow else None
        if rows:
            activations.activate[(_blocks(rows, 16), _blocks(width, BLOCK))](
                h_RGF.contiguous(), a_RF if keep_RF is None else keep_RF.contiguous(), a_RF, a_RF,
                scale if narrow else a_RF, rows, width, _stride(scale),
                KIND=activations.KINDS[name], G=gates, DROP=keep_RF is not None, ROUND=narrow, BR=16, BLOCK=BLOCK,
                num_warps=8,
            )  # fmt: skip
        return Operand(a_RF, scale)

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Operand]:
        return self._activate_back(h_RGF, da_RF, name, keep_RF, narrow=False)

    def _activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None, *, narrow: bool
    ) -> tuple[Tensor, Tensor, Operand]:
        rows, gates, width = h_RGF.shape
        a_RF, dh_RN = torch.empty_like(da_RF), torch.empty_like(h_RGF).flatten(1)
        q_RN = torch.empty_like(dh_RN, dtype=E4M3) if narrow else dh_RN
        scale = _row_scales(h_RGF, rows, gates * width) if narrow else None
        if rows:
            activations.activate_back[(_blocks(rows, 16), _blocks(width, BLOCK))](
                h_RGF.contiguous(), da_RF.contiguous(), a_RF if keep_RF is None else keep_RF.contiguous(), a_RF, dh_RN,
                q_RN, scale if narrow else dh_RN, rows, width, _stride(scale),
                KIND=activations.KINDS[name], G=gates, DROP=keep_RF is not None, ROUND=narrow, BR=16, BLOCK=BLOCK,
                num_warps=8,
            )  # fmt: skip
        return a_RF, dh_RN, Operand(q_RN, scale)

    def columns(self, x_RK: Tensor, groups: Groups, row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        return (x_RK,) if row_R is None else (x_RK, row_R)

    def weight_gradient(self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: Groups, w: Tensor) -> Tensor:
        x, x_last, gathered = x_RK[0], x_RK[-1], len(x_RK) > 1
        narrow = x.dtype == E4M3
        if narrow:  # operands come transposed: rows are the inner dimension, which FP8 products read contiguously
            x, dy = x.t(), dy_RN[0].t()
        else:  # a copy of gathered rows costs far less than looking them up in each tile (docs/kernels.md)
            x, dy = x.index_select(0, x_last) if gathered else x, dy_RN[0]
        main = main_gradient(w)
        dw = torch.empty_like(w, memory_format=torch.contiguous_format)
        grouped_gemm.grouped_weight_gradient[(programs(x.device),)](
            x, dy, dw if main is None else main, x_last, dy_RN[-1],
            groups.padded_starts if narrow else groups.starts, len(groups.counts), x.shape[1], dy.shape[1],
            *x.stride(), *dy.stride(), FP8=narrow, ADD=main is not None, GROUP=8, num_warps=8,
            **gradient_tile(x.device, narrow),
        )  # fmt: skip
        return dw


class GroupedMmBackend(TritonGemmBackend):
    """bf16 with PyTorch's grouped products; activations, and weight gradients that are added in fp32, in Triton."""

    def groups(self, counts: list[int], device: torch.device) -> tuple[Groups, Tensor]:
        groups = Groups.of(counts, device)
        return groups, groups.starts[1:].clone()  # a tensor of its own is aligned, as grouped_mm wants it

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Operand:
        x_RK = x_RK if row_R is None else x_RK.index_select(0, row_R)
        return Operand(_rows_contiguous(x_RK))

    def product(self, x_RK: Operand, w_LKN: Operand, groups: tuple[Groups, Tensor], dtype: torch.dtype) -> Tensor:
        x, w = x_RK.values, w_LKN.values
        if not len(x):  # a grouped product needs a row
            return x.new_empty((0, w.shape[2]), dtype=dtype)
        return F.grouped_mm(x, w, offs=groups[1], out_dtype=dtype)

    def weight_gradient(
        self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: tuple[Groups, Tensor], w: Tensor
    ) -> Tensor:
        return super().weight_gradient(x_RK, dy_RN, groups[0], w)


class Float8GemmBackend(TritonGemmBackend):
    """FP8 with fp32 sums every 128 of the inner dimension."""

    def __init__(self, recipe: Recipe, *, narrow_weight_gradient: bool = False):
        self.recipe, self.narrow_weight_gradient = recipe, narrow_weight_gradient
        self.blockwise = recipe == RECIPES["blockwise"]

    def weight(self, w_LKN: Tensor) -> Weight:
        if not self.blockwise:
            back = quantise(w_LKN, self.recipe.weight_back).transpose()
            return Weight(_weight(quantise(w_LKN, self.recipe.weight)), _weight(back))
        experts, inner, outer = w_LKN.shape
        q, qt = (w_LKN.new_empty((experts, *shape), dtype=E4M3) for shape in ((inner, outer), (outer, inner)))
        blocks = _blocks(inner, BLOCK), _blocks(outer, BLOCK)
        scale = w_LKN.new_empty((experts, *blocks), dtype=torch.float32)
        fp8_cast.round_weight[(*blocks, experts)](
            w_LKN, q, qt, scale, inner, outer, *w_LKN.stride(), BLOCK=BLOCK, num_warps=8
        )
        # The inner dimension of each product has to be the contiguous one.
        return Weight(Operand(qt.transpose(1, 2), scale), Operand(q.transpose(1, 2), scale.transpose(1, 2)))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Operand:
        # What several rows are is rounded once.
        if not self.blockwise:
            q = quantise(x_RK, self.recipe.rows)
            return Operand(q.values, q.scale, row_R=row_R)
        x_RK = _rows_contiguous(x_RK)
        rows, inner = x_RK.shape
        q = x_RK.new_empty((rows, inner), dtype=E4M3)
        scale = _row_scales(x_RK, rows, inner)
        if rows:
            fp8_cast.round_rows[(_blocks(rows, 16), scale.shape[1])](
                x_RK, q, scale, rows, inner, x_RK.stride(0), _stride(scale), BR=16, BLOCK=BLOCK
            )
        return Operand(q, scale, row_R=row_R)

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None = None) -> Operand:
        if self.blockwise:
            return self._activate(h_RGF, name, keep_RF, narrow=True)
        return self.rows(super().activate(h_RGF, name, keep_RF).values)

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Operand]:
        # A block must not reach from the gates' half into the other one.
        together = self.blockwise and h_RGF.shape[2] % BLOCK == 0
        a_RF, dh_RN, dh = self._activate_back(h_RGF, da_RF, name, keep_RF, narrow=together)
        return a_RF, dh_RN, dh if together else self.rows(dh_RN)

    def columns(self, x_RK: Tensor, groups: Groups, row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        if not self.narrow_weight_gradient:
            return super().columns(x_RK, groups, row_R)
        inner, padded = x_RK.shape[1], ROWS * len(groups.tiles)
        q = x_RK.new_empty((inner, padded), dtype=E4M3)
        scale = x_RK.new_empty((len(groups.tiles), inner), dtype=torch.float32)
        if not self.blockwise:
            x_RK = x_RK if row_R is None else x_RK.index_select(0, row_R)
            return _columns(x_RK, self.recipe.columns, groups, q, scale)
        x_RK = _rows_contiguous(x_RK)
        if padded:
            fp8_cast.round_columns[(len(groups.tiles), _blocks(inner, 64))](
                x_RK, q, scale, groups.tiles if row_R is None else row_R, groups.tiles, inner, padded, x_RK.stride(0),
                GATHER=row_R is not None, BLOCK=ROWS, BK=64,
            )  # fmt: skip
        return q, scale


def _rows_contiguous(x_RK: Tensor) -> Tensor:
    """Kernels step through a row by ones; rows may lie anywhere."""
    return x_RK if x_RK.stride(-1) == 1 else x_RK.contiguous()


def _row_scales(like: Tensor, rows: int, inner: int) -> Tensor:
    """Room for the scales [R, K / BLOCK] of 1 x BLOCK, those of one block side by side; blocks lie a multiple of
    SCALE_ROWS apart, whatever the rows of this step are."""
    room = like.new_empty((_blocks(inner, BLOCK), SCALE_ROWS * _blocks(rows, SCALE_ROWS)), dtype=torch.float32)
    return room.t()[:rows]


def _stride(scale: Tensor | None) -> int:
    """How far apart the scales of two blocks lie; without scales a number that fits the kernel that has some."""
    return SCALE_ROWS if scale is None else scale.stride(1)


def _weight(w: Quantised) -> Operand:
    values = w.values.transpose(1, 2).contiguous().transpose(1, 2)
    return Operand(values, w.scale, blocks=False)


def _columns(x_RK: Tensor, block: Block, groups: Groups, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Without a kernel, for recipes with one scale for all rows of an expert: it is repeated for each tile."""
    q.view(torch.uint8).zero_()
    tile = 0
    for x in x_RK.split(groups.counts):
        rounded, tiles = quantise(x, block), _blocks(len(x), ROWS)
        q[:, ROWS * tile : ROWS * tile + len(x)] = rounded.values.t()
        scale[tile : tile + tiles] = rounded.scale
        tile += tiles
    return q, scale
