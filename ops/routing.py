"""What a router computes: its logits, what it decides for its tokens, and what is counted of its scores.

Legend: T tokens of this rank, M tokens of the micro-batch (all ranks that share it), E experts, K choices per token,
D hidden, B sequences of the micro-batch, or 1 where it is balanced as a whole, X anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.operation import Implementation, Operation
from ops.run_context import RunContext

TINY = 1e-20
"""Added to sums of chosen probabilities, which can all underflow to zero where a plan or groups limit the choice."""


def count(index_X: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each index occurs. torch.bincount would make the host wait for the device."""
    return index_X.new_zeros(size).scatter_add_(0, index_X, torch.ones_like(index_X))


def count_loads(experts_MK: Tensor, num_experts: int, sequences: int = 1) -> Tensor:
    """int64 [B, E]: choices of each expert, of each sequence by itself. Index E is no choice.

    Args:
        sequences: B, where tokens come in the order of (position, sequence).
    """
    sequence_M = torch.arange(len(experts_MK), device=experts_MK.device) % sequences
    flat = (sequence_M[:, None] * (num_experts + 1) + experts_MK).flatten()
    counts = count(flat, sequences * (num_experts + 1))
    return counts.view(sequences, num_experts + 1)[:, :num_experts]


@dataclass(frozen=True)
class RouterStats:
    """What losses and log want of the router's scores: sums over this rank's tokens, in which padding has no part."""

    load_BE: Tensor
    """int64: choices of each expert, before any drop."""
    probs_BE: Tensor
    """Of the probabilities, with gradient."""
    z: Tensor
    """Of logsumexp(logits)^2, with gradient."""
    entropy: Tensor
    """Of the entropies of the tokens' distributions, in nats."""
    logit_square: Tensor
    """Of the mean squared logits."""

    @staticmethod
    def of(
        logits_TE: Tensor, probs_TE: Tensor, experts_TK: Tensor, padding_T: Tensor | None = None, sequences: int = 1
    ) -> "RouterStats":
        """Args:
        experts_TK: the choices; index E is none.
        padding_T: True where there is no token.
        sequences: B, where tokens come in the order of (position, sequence).
        """

        def counted(values_TX: Tensor) -> Tensor:
            return values_TX if padding_T is None else values_TX.masked_fill(padding_T[:, None], 0.0)

        probs_BE = counted(probs_TE).unflatten(0, (len(probs_TE) // sequences, sequences)).sum(0)
        z = counted(logits_TE.logsumexp(-1, keepdim=True).square()).sum()
        with torch.no_grad():
            entropy = counted(-torch.special.xlogy(probs_TE, probs_TE).sum(1, keepdim=True)).sum()
            square = counted(logits_TE.square().mean(1, keepdim=True)).sum()
        return RouterStats(count_loads(experts_TK, probs_TE.shape[1], sequences), probs_BE, z, entropy, square)


@dataclass(frozen=True)
class Choice:
    """The decision for T tokens."""

    gates_TK: Tensor
    """fp32, the weight of each choice in the output."""
    experts_TK: Tensor
    """int64, the likeliest expert first; ties go to the lower expert. E where there is no choice: for padding, and for
    the places that expert choice leaves over."""


@dataclass(frozen=True)
class Routing(Choice):
    """With what losses and metrics want of it."""

    router_stats: RouterStats
    """Of the scores of all experts, each token's divided by their sum: what is balanced and logged."""
    logits_TE: Tensor
    """fp32, what the scores are made of."""
    counted_TK: Tensor | None = None
    """int64, whose loads the balancing loss takes where these are not experts_TK: the best of the scores without bias
    and groups, E for padding."""


@dataclass(frozen=True)
class Rule:
    """How a token chooses by itself. The options are those of MoeConfig."""

    top_k: int
    score_function: str
    after: bool
    """softmax_order=after."""
    renormalize: bool
    scale: float
    groups: int = 1
    """Of experts, of which the best top_k_groups are chosen first."""
    top_k_groups: int = 1


FUSED_SCORE_FUNCTIONS = ("softmax", "sigmoid")
"""The score functions that a FusedRoute serves."""

FusedRoute = Callable[[Tensor, Tensor | None, Tensor | None, Rule, int], Routing]
"""(logits [T, E] fp32, bias [E] or none, padding [T] or none, rule, B) -> what Router.route says, in one go."""


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """fp32 [T, E], from inputs of any precision, without keeping an fp32 copy of them for the backward pass."""
    return _Logits.apply(x_TD, weight_ED) if torch.is_grad_enabled() else x_TD.float() @ weight_ED.t()


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return x_TD.float() @ weight_ED.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        return (dlogits_TE @ weight_ED).to(x_TD.dtype), dlogits_TE.t() @ x_TD.float()


RouterLogits = Callable[[Tensor, Tensor], Tensor]
"""The arguments and the result of `router_logits`."""


def _trial(logits: RouterLogits, context: RunContext) -> list[Tensor]:
    """Of nine tokens."""
    hidden, experts = context.model.hidden_size, context.model.moe.num_experts
    x_TD = context.randn(9, hidden).requires_grad_()
    weight_ED = context.randn(experts, hidden, seed=1, dtype=torch.float32).requires_grad_()
    logits_TE = logits(x_TD, weight_ED)
    gradients = torch.autograd.grad(
        logits_TE, (x_TD, weight_ED), context.randn(9, experts, seed=2, dtype=torch.float32)
    )
    return [logits_TE.detach(), *gradients]


ROUTER_LOGITS = Operation(
    field="router_logits",
    name="router logits",
    reference=lambda context: Implementation("torch", lambda context: router_logits, "in fp32"),
    implementations=[],
    trial=_trial,
    # The tokens' gradient is rounded to bf16, now and then to the other neighbour.
    tolerance={torch.float32: 1e-3, torch.bfloat16: 1e-3},
    is_used=lambda context: bool(context.model.moe.num_experts),
)
