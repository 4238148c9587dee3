"""The model in float64, one token, one head and one expert at a time: slow, meant to be checked by eye against the
papers, and sharing no code with moe/. Everything is differentiable, so gradients come from it as well.

Legend: T tokens, D hidden, E experts, K choices per token, F expert hidden, G gate and up (or one projection),
S sequence, B batch, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from conf.schema import ModelConfig, MoeConfig
from tests.moe.reference_attention import Weights, rms_norm


@dataclass
class Sparse:
    """What one sparse layer did with a micro-batch."""

    out_TD: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    probs_TE: Tensor
    experts: list[list[int]]
    """[T][K], the likeliest first; where experts choose, those that took the token."""
    kept: list[list[bool]]
    """[T][K]: False where the expert was full."""


def silu(h: Tensor) -> Tensor:
    return h / (1 + torch.exp(-h))


def gelu(h: Tensor) -> Tensor:
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def relu(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0)


def feed_forward(
    x_D: Tensor,
    into: list[Tensor],
    out_FD: Tensor,
    activation: str,
    biases: tuple[list[Tensor], Tensor] | None = None,
    keep_F: Tensor | float = 1.0,
) -> Tensor:
    """into: [gate, up] of a gated activation, else one projection, each [D, F]. biases: of those, and of the way out.
    keep_F: what dropout multiplies the activation by."""
    h = [x_D @ w for w in into]
    if biases:
        h = [h_F + b_F for h_F, b_F in zip(h, biases[0], strict=True)]
    if activation == "swiglu":
        act_F = silu(h[0]) * h[1]
    elif activation == "geglu":
        act_F = gelu(h[0]) * h[1]
    elif activation.startswith("clamped_swiglu"):
        alpha, limit = map(float, activation.split(":")[1:] or (1.702, 7.0))
        gate_F, up_F = torch.minimum(h[0], torch.tensor(limit)), torch.clip(h[1], -limit, limit)
        act_F = (up_F + 1) * gate_F / (1 + torch.exp(-alpha * gate_F))
    else:
        act_F = {"gelu": gelu, "relu": relu, "relu2": lambda h: relu(h) ** 2}[activation](h[0])
    y_D = (act_F * keep_F) @ out_FD
    return y_D + biases[1] if biases else y_D


def softmax(h: Tensor) -> Tensor:
    return torch.exp(h) / torch.exp(h).sum()


def choose(scores_E: Tensor, top_k: int, groups: int = 1, top_k_groups: int = 1, of_group: int = 2) -> list[int]:
    """The k best experts, of the groups whose two best (of_group) add up to most; among equals the lower one first."""
    score = scores_E.tolist()
    size = len(score) // groups
    members = [range(first, first + size) for first in range(0, len(score), size)]
    if groups > 1:
        best = sorted(members, key=lambda group: (-sum(sorted(score[e] for e in group)[-of_group:]), group[0]))
        members = best[:top_k_groups]
    return sorted((e for group in members for e in group), key=lambda e: (-score[e], e))[:top_k]


def gates_of(scores_E: Tensor, chosen: list[int], renormalize: bool | None) -> list[Tensor]:
    gates = [scores_E[e] for e in chosen]
    if renormalize or (renormalize is None and len(chosen) > 1):
        return [g / sum(gates) for g in gates]
    return gates


def scores_of(logits_E: Tensor, moe: MoeConfig) -> Tensor:
    return softmax(logits_E) if moe.score_function == "softmax" else 1 / (1 + torch.exp(-logits_E))


def sparse_mixer(logits_E: Tensor, chosen: list[int], eps: float) -> list[Tensor]:
    """The gate of each choice: its share in the softmax over the experts that are left and near the best of them."""
    gates = []
    for k, expert in enumerate(chosen):
        left = [e for e in range(len(logits_E)) if e not in chosen[:k]]
        best = max(logits_E[e].item() for e in left)
        near = [e for e in left if best - logits_E[e].item() <= 2 * eps * max(abs(logits_E[e].item()), best)]
        gates.append(torch.exp(logits_E[expert]) / sum(torch.exp(logits_E[e]) for e in near))
    return gates


def route(
    logits_E: Tensor, moe: MoeConfig, bias_E: Tensor | float = 0.0, chosen: list[int] | None = None
) -> tuple[Tensor, list[int], list[Tensor]]:
    """One token's (probabilities of all experts, chosen experts, their gates).

    Args:
        chosen: decided elsewhere; None: the best of the token's own scores.
    """
    scores_E = scores_of(logits_E, moe)
    if chosen is None:
        by_logits = moe.softmax_order == "after" or moe.sparse_mixer_eps is not None
        ranked_E = logits_E if by_logits else scores_E + bias_E
        of_group = 1 if moe.group_score == "max" else 2
        chosen = choose(ranked_E, moe.top_k, moe.num_expert_groups, moe.top_k_groups, of_group)
    if moe.load_balancing == "expert_choice":
        gates = [scores_E[e] for e in chosen]
    elif moe.sparse_mixer_eps is not None:
        gates = sparse_mixer(logits_E, chosen, moe.sparse_mixer_eps)
    elif moe.softmax_order == "after":
        gates = list(softmax(logits_E[chosen]))
    else:
        gates = gates_of(scores_E, chosen, moe.renormalize)
    return scores_E / scores_E.sum(), chosen, [moe.routed_scaling_factor * gate for gate in gates]


def transport_plan(logits_TE: Tensor, rounds: int = 32) -> Tensor:
    """Sinkhorn and Knopp: exp(logits), its rows and its columns made to sum to 1/T and 1/E in turn."""
    plan_TE = torch.exp(logits_TE.detach())
    for _ in range(rounds):
        plan_TE = plan_TE / plan_TE.sum(1, keepdim=True) / plan_TE.shape[0]
        plan_TE = plan_TE / plan_TE.sum(0, keepdim=True) / plan_TE.shape[1]
    return plan_TE


def taken_by_experts(scores_TE: Tensor, limit: int) -> list[list[int]]:
    """Zhou et al. 2022, section 3.2: the experts that each token is among the best `limit` of; ties to the earlier."""
    taken: list[list[int]] = [[] for _ in scores_TE]
    for e, score_T in enumerate(scores_TE.t().tolist()):
        for t in sorted(range(len(score_T)), key=lambda t: (-score_T[t], t))[:limit]:
            taken[t].append(e)
    return taken


def decide(logits_TE: Tensor, moe: MoeConfig) -> list[list[int] | None]:
    """What is chosen for a micro-batch as a whole while training; None: each token chooses alone."""
    if moe.load_balancing == "sinkhorn":
        return [choose(row_E, moe.top_k) for row_E in transport_plan(logits_TE)]
    if moe.load_balancing == "expert_choice":
        limit = expert_capacity(len(logits_TE), moe.top_k, moe.num_experts, moe.capacity_factor)
        return taken_by_experts(torch.stack([scores_of(logits_E, moe) for logits_E in logits_TE]), limit)
    return [None] * len(logits_TE)


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Switch, eq. 3, in exact arithmetic: 1.1 means eleven tenths."""
    return math.ceil(Fraction(str(factor)) * tokens * top_k / num_experts)


def keep_first(experts: list[list[int]], num_experts: int, limit: int | None) -> list[list[bool]]:
    """First choices of all tokens in order, then second choices, until each expert is full. None: no limit."""
    taken = [0] * num_experts
    kept = [[True] * len(chosen) for chosen in experts]
    for k in range(len(experts[0])):
        for t, chosen in enumerate(experts):
            kept[t][k] = limit is None or taken[chosen[k]] < limit
            taken[chosen[k]] += 1
    return kept


def keep_largest(
    experts: list[list[int]], priority: list[list[float]], num_experts: int, limit: int | None
) -> list[list[bool]]:
    """The most urgent choices, until each expert is full; of equal ones those that keep_first would take."""
    choices = [(-priority[t][k], k, t) for t, chosen in enumerate(experts) for k in range(len(chosen))]
    kept = [[False] * len(chosen) for chosen in experts]
    for e in range(num_experts):
        for _, k, t in sorted(choice for choice in choices if experts[choice[2]][choice[1]] == e)[:limit]:
            kept[t][k] = True
    return kept


def balancing_loss(probs_TE: Tensor, experts: list[list[int]]) -> Tensor:
    """Switch, eq. 4 to 6: E * sum_e (share of the choices that expert e got) * (its mean probability)."""
    choices = [e for chosen in experts for e in chosen]
    num_experts = probs_TE.shape[1]
    return num_experts * sum(choices.count(e) / len(choices) * probs_TE[:, e].mean() for e in range(num_experts))


def sequence_balancing_loss(probs_TE: Tensor, experts: list[list[int]], sequence: list[int]) -> Tensor:
    """The mean of each sequence's loss; sequence: [T], the one that a token belongs to."""
    members = [[t for t, other in enumerate(sequence) if other == one] for one in sorted(set(sequence))]
    return sum(balancing_loss(probs_TE[own], [experts[t] for t in own]) for own in members) / len(members)


def z_loss(logits_TE: Tensor) -> Tensor:
    """ST-MoE, eq. 5."""
    return sum(torch.log(torch.exp(logits_E).sum()) ** 2 for logits_E in logits_TE) / len(logits_TE)


def sparse_layer(
    x_TD: Tensor,
    weights: Weights,
    moe: MoeConfig,
    activation: str,
    factor: float | None,
    sequence: list[int] | None = None,
    keep: Callable[[int, int], Tensor | float] = lambda token, choice: 1.0,
    *,
    noise_TD: Tensor | float = 1.0,
    priority: list[list[float]] | None = None,
) -> Sparse:
    """A training pass over the tokens of a micro-batch, at least one.

    Args:
        factor: the capacity factor; None: dropless.
        sequence: the sequence of each token; None: all are one.
        keep: what dropout multiplies the hidden width [F] of a token's choice by.
        noise_TD: what the router's input is multiplied by.
        priority: [T][K], the draws of drop_policy=random.
    """
    router_ED, w_in_EDGF, w_out_EFD = (weights[n] for n in ("router.weight", "experts.w_in", "experts.w_out"))
    b_in_EGF, b_out_ED = weights.get("experts.b_in"), weights.get("experts.b_out")
    logits_TE = torch.stack([torch.stack([x_D @ router_D for router_D in router_ED]) for x_D in x_TD * noise_TD])
    logits_TE = logits_TE + weights.get("router.logit_bias", 0.0)
    bias_E = weights.get("router.bias", 0.0)
    rows = (route(logits_E, moe, bias_E, own) for logits_E, own in zip(logits_TE, decide(logits_TE, moe), strict=True))
    probs, experts, gates = (list(column) for column in zip(*rows, strict=True))
    probs_TE = torch.stack(probs)
    limit = None if factor is None else expert_capacity(len(x_TD), moe.top_k, moe.num_experts, factor)
    if moe.load_balancing == "expert_choice":
        kept = [[True] * len(chosen) for chosen in experts]
    elif moe.drop_policy == "position":
        kept = keep_first(experts, moe.num_experts, limit)
    else:
        by_gate = [[g.item() for g in row] for row in gates]
        kept = keep_largest(experts, priority or by_gate, moe.num_experts, limit)
    rows = []
    for t, x_D in enumerate(x_TD):
        out_D = shared_experts(x_D, under(weights, "shared."), activation)
        for k, e in enumerate(experts[t]):
            if kept[t][k]:
                into = [w_in_EDGF[e, :, g, :] for g in range(w_in_EDGF.shape[2])]
                biases = None if b_in_EGF is None else (list(b_in_EGF[e]), b_out_ED[e])
                before, after = (gates[t][k], 1.0) if moe.gate_on == "input" else (1.0, gates[t][k])
                out_D = out_D + after * feed_forward(before * x_D, into, w_out_EFD[e], activation, biases, keep(t, k))
        rows.append(out_D)
    counted = experts
    if (moe.bias_update_rate is not None or moe.num_expert_groups > 1) and moe.aux_loss_counts == "scores":
        counted = [choose(p_E, moe.top_k) for p_E in probs_TE]  # DeepSeek-V3, eq. 18: without bias and groups
    if moe.load_balancing == "seq_aux_loss":
        aux = sequence_balancing_loss(probs_TE, counted, sequence or [0] * len(x_TD))
    elif moe.load_balancing == "global_aux_loss":
        aux = sum(load * probs_TE[:, e].mean() for e, load in enumerate(weights["router.last_load"].tolist()))
    else:
        aux = balancing_loss(probs_TE, counted)
    return Sparse(torch.stack(rows), aux, z_loss(logits_TE), probs_TE, experts, kept)


def shared_experts(x_D: Tensor, weights: Weights, activation: str) -> Tensor:
    if not weights:
        return torch.zeros_like(x_D)
    gate = 1 / (1 + torch.exp(-(weights["gate"][0] @ x_D))) if "gate" in weights else 1.0
    return gate * dense_layer(x_D, under(weights, "ffn."), activation)


def norm_all(x_BSD: Tensor, weights: Weights, name: str, model: ModelConfig) -> Tensor:
    gain_D = weights[f"{name}.weight"] + model.norm_zero_centered
    if model.norm == "layernorm":  # the RMSNorm of what is left without the mean, and a bias
        x_BSD = x_BSD - x_BSD.mean(-1, keepdim=True)
    normed = [torch.stack([rms_norm(x_D, gain_D, model.norm_eps) for x_D in x_SD]) for x_SD in x_BSD]
    return torch.stack(normed) + weights.get(f"{name}.bias", 0.0)


def under(weights: Weights, prefix: str) -> Weights:
    """The weights of one part, by their names within it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def dense_layer(x_D: Tensor, weights: Weights, activation: str) -> Tensor:
    into = [weights[n].t() for n in ("gate.weight", "up.weight") if n in weights]
    biases = [weights[n] for n in ("gate.bias", "up.bias") if n in weights]
    all_biases = (biases, weights["down.bias"]) if biases else None
    return feed_forward(x_D, into, weights["down.weight"].t(), activation, all_biases)
