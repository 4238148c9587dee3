"""The loss of every token in Triton, for ops.fused_cross_entropy.

Legend: T tokens, V vocabulary (this rank's slice).
"""

import torch
import triton.language as tl
from torch import Tensor

from ops.fused_cross_entropy import losses_with
from ops.triton.jit import jit

BLOCK = 4096


@jit
def cross_entropy_sums(logits_ptr, labels_ptr, largest_ptr, sum_ptr, label_ptr, V, stride_t, BLOCK: tl.constexpr):
    """One program a token: the largest logit and the sum of exponentials below it, kept up to date block by block
    (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3), and the label's logit."""
    token = tl.program_id(0).to(tl.int64)
    row = logits_ptr + token * stride_t
    largest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), axis=0)
        largest = new
    label = tl.load(labels_ptr + token)
    there = (label >= 0) & (label < V)
    tl.store(label_ptr + token, tl.load(row + label, mask=there, other=0.0).to(tl.float32))
    tl.store(largest_ptr + token, largest)
    tl.store(sum_ptr + token, total)


@jit
def cross_entropy_gradient(
    logits_ptr, labels_ptr, largest_ptr, sum_ptr, grad_ptr, V, stride_t, BLOCK: tl.constexpr
):  # fmt: skip
    """In place; the grid is (T, V / BLOCK)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + token * stride_t + columns
    x = tl.load(place, mask=columns < V, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(largest_ptr + token)) / tl.load(sum_ptr + token)
    p = tl.where(columns == tl.load(labels_ptr + token), p - 1, p)
    tl.store(place, (p * tl.load(grad_ptr + token)).to(logits_ptr.dtype.element_ty), mask=columns < V)


class _Triton:
    def sums(self, logits_TV: Tensor, mine_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = logits_TV.shape
        largest_T, sum_T, label_T = (logits_TV.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        cross_entropy_sums[(tokens,)](
            logits_TV, mine_T, largest_T, sum_T, label_T, vocabulary, vocabulary, BLOCK=BLOCK, num_warps=8
        )
        return largest_T, sum_T, label_T

    def become_gradient(
        self, logits_TV: Tensor, mine_T: Tensor, largest_T: Tensor, sum_T: Tensor, grad_T: Tensor
    ) -> None:
        tokens, vocabulary = logits_TV.shape
        cross_entropy_gradient[(tokens, -(-vocabulary // BLOCK))](
            logits_TV, mine_T, largest_T, sum_T, grad_T, vocabulary, vocabulary, BLOCK=BLOCK, num_warps=8
        )


token_losses = losses_with(_Triton())
