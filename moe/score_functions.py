"""What makes a router's scores of its logits: a function and a name for each.

Legend: T tokens, E experts, K assignments per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.registry import Registry
from ops.routing import TINY


@dataclass(frozen=True)
class Scores:
    """Of every token for every expert [T, E], fp32, with gradients."""

    scores: Tensor
    """What is compared in the choice, and what the gates are."""
    probs: Tensor
    """The scores divided by their sum over the experts: what the load-balancing loss and the entropy take."""
    logs: Tensor | None = None
    """The scores' logarithms, where gates are to be renormalised by the softmax of these: it is exact where all chosen
    scores are too small for a sum. None: they are divided by their sum."""

    def renormalized(self, gates_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The chosen scores of each token divided by their sum."""
        if self.logs is not None:
            return self.logs.gather(1, experts_TK).softmax(-1)
        return gates_TK / (gates_TK.sum(-1, keepdim=True) + TINY)


def sparse_mixer_gates(logits_TE: Tensor, experts_TK: Tensor, eps: float) -> Tensor:
    """[T, K]: SparseMixer's gates without its sampling (Phi-3.5-MoE; arXiv:2310.00811, arXiv:2409.12136, section 3.1).

    Args:
        experts_TK: those with the largest logits, in their order.
        eps: half of the distance, relative to the larger magnitude, within which a logit is near the largest.
    """
    gates, left_TE = [], logits_TE
    for expert_T1 in experts_TK.split(1, dim=1):
        with torch.no_grad():
            best_T1 = left_TE.amax(1, keepdim=True)
            far_TE = (best_T1 - logits_TE) / logits_TE.abs().maximum(best_T1) > 2 * eps
        gates.append(left_TE.masked_fill(far_TE, -torch.inf).softmax(-1).gather(1, expert_T1))
        left_TE = left_TE.scatter(1, expert_T1, -torch.inf)
    return torch.cat(gates, dim=1)


@dataclass(frozen=True)
class ScoreFunction:
    """A value of model.moe.score_function."""

    name: str
    score: Callable[[Tensor], Scores]
    """Of logits [T, E]. A larger logit gives the token a larger score, since some choices compare the logits."""


def _check(function: ScoreFunction) -> None:
    logits_TE = torch.linspace(-4, 4, 32).view(4, 8).T  # rising over the experts
    scores = function.score(logits_TE)
    # An extension's function may return anything, whatever its type says.
    fits = isinstance(scores, Scores)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not fits or not scores.scores.shape == scores.probs.shape == logits_TE.shape:
        raise ValueError(f"score function {function.name}: it does not return Scores whose tensors are [T, E]")
    if not (scores.scores.diff(dim=1) > 0).all():
        raise ValueError(f"score function {function.name}: a larger logit does not give a larger score")
    if not torch.allclose(scores.probs.sum(1), torch.ones(8), atol=1e-5):
        raise ValueError(f"score function {function.name}: the probabilities of a token do not add up to 1")


def _softmax(logits_TE: Tensor) -> Scores:
    """Switch (Fedus et al. 2021, arXiv:2101.03961, eq. 1)."""
    probs_TE = logits_TE.softmax(-1)
    return Scores(probs_TE, probs_TE)


def _sigmoid(logits_TE: Tensor) -> Scores:
    """DeepSeek-V3 (arXiv:2412.19437, eq. 15)."""
    scores_TE, logs_TE = logits_TE.sigmoid(), F.logsigmoid(logits_TE)
    # The softmax of the logarithms is the scores over their sum, however small all of them are.
    return Scores(scores_TE, logs_TE.softmax(-1), logs_TE)


SCORE_FUNCTIONS = Registry(
    "score function", ScoreFunction("softmax", _softmax), ScoreFunction("sigmoid", _sigmoid), check=_check
)
