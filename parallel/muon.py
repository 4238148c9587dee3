"""Muon's direction for a matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
arXiv:2502.16982, section 2.2): its momentum with every singular value moved towards 1, in the RMS of AdamW's updates.

Legend: N matrices of one shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from conf.schema import MUON_ITERATIONS

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the odd polynomial a x + b x^3 + c x^5 that each iteration applies to the singular values (Jordan et al.)."""
EPS = 1e-7
"""Added to the Frobenius norm that a matrix is divided by first."""
RMS = 0.2
"""Of the elements of an update by AdamW, which Muon's is scaled to, so that both share learning rate and weight decay
(arXiv:2502.16982, eq. 4)."""


def newton_schulz(x_NRC: Tensor) -> Tensor:
    """[N, R, C] in the type of the input: U f(S) V^T for each matrix U S V^T, where f applies the polynomial
    MUON_ITERATIONS times to the singular values divided by the Frobenius norm. Singular values above
    0.2 % of that norm come out between 0.68 and 1.21."""
    a, b, c = COEFFICIENTS
    is_tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if is_tall else x_NRC
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
    x = (x / (norm + EPS)).to(x_NRC.dtype)
    for _ in range(MUON_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def replace_by_directions(matrices: Sequence[Tensor]) -> None:
    """Replaces each matrix by its direction, in place. Those of one shape are computed together.

    Args:
        matrices: [..., C] each; all dimensions but the last are rows.
    """
    alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        columns = matrix.shape[-1]
        alike[matrix.numel() // columns, columns].append(matrix)
    for shape, group in alike.items():
        scale = RMS * max(shape) ** 0.5
        found_NRC = newton_schulz(torch.stack([matrix.reshape(shape) for matrix in group]))
        for matrix, found_RC in zip(group, found_NRC, strict=True):
            matrix.copy_(found_RC.reshape(matrix.shape)).mul_(scale)
