"""Tokens to rows and back (ops/permute.py) by TransformerEngine.

Its function sorts the choices of tokens by expert; here they are sorted already. So the row that a choice is to have is
given in place of the expert, and choices without a row come last, where they are cut off.

Legend: T tokens, D hidden, K choices per token, R routed rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.permute import TORCH_PERMUTATION


class TePermutation:
    """ops.permute.Permutation, where at most one row is no choice."""

    def __init__(self) -> None:
        from transformer_engine.pytorch import (  # pyright: ignore[reportMissingImports]
            moe_permute,
            moe_unpermute,
        )

        self._permute, self._unpermute = moe_permute, moe_unpermute

    def permute(self, x_TD: Tensor, choice_R: Tensor, top_k: int, padded: bool) -> Tensor:
        rows = len(choice_R)
        if not rows:  # it would take all
            return TORCH_PERMUTATION.permute(x_TD, choice_R, top_k, padded)
        x_TD = F.pad(x_TD, (0, 0, 0, 1)) if padded else x_TD.contiguous()
        place = torch.full((len(x_TD) * top_k,), rows, dtype=torch.int32, device=x_TD.device)
        place.scatter_(0, choice_R, _count(choice_R))
        return self._permute(x_TD, place.view(-1, top_k), rows, map_type="index")[0]

    def permute_backward(self, rows_RD: Tensor, choice_R: Tensor, top_k: int, tokens: int) -> Tensor:
        return self._sum(rows_RD, choice_R, torch.ones((tokens, top_k), device=rows_RD.device))

    def unpermute(self, y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor, padded: bool) -> Tensor:
        if not len(choice_R):
            return TORCH_PERMUTATION.unpermute(y_RD, choice_R, gates_TK, padded)
        out_TD = self._sum(y_RD, choice_R, F.pad(gates_TK, (0, 0, 0, 1)) if padded else gates_TK)
        return out_TD[:-1] if padded else out_TD

    def _sum(self, y_RD: Tensor, choice_R: Tensor, gates_TK: Tensor) -> Tensor:
        """[T, D]: every row times its gate, added to its token, in fp32."""
        tokens, top_k = gates_TK.shape
        row_of = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=y_RD.device)
        row_of.scatter_(0, choice_R % top_k * tokens + choice_R // top_k, _count(choice_R))
        gates_TK = gates_TK.float().contiguous()
        return self._unpermute(y_RD.contiguous(), row_of, merging_probs=gates_TK, map_type="index")


def _count(choice_R: Tensor) -> Tensor:
    return torch.arange(len(choice_R), dtype=torch.int32, device=choice_R.device)
