"""The router (moe/router.py:Router.route) in Triton: each token's logits are read once in either direction, and its
scores are never written.

Legend: T tokens, E experts, K choices per token, B sequences of the micro-batch, or 1 where it is balanced as a whole,
S positions: T = S * B in the order of (position, sequence), P programs that share a sequence, C = 2 * E + 3 sums.

Triton's stubs have tl.sum and tl.max return a tuple or a constant, where a kernel gets a tensor: hence the rules that
are ignored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.routing import FUSED_SCORE_FUNCTIONS, TINY, RouterStats, Routing, Rule
from ops.triton.jit import jit
from ops.triton.tiling import programs
from parallel.activation_checkpoint import LIBRARY, MUST_SAVE_OPS

TILE, LARGEST = 1024, 4096
"""Scores that four warps hold at a time, and experts at most."""
LITTLE = tl.constexpr(TINY)
NONE = tl.constexpr(-(2**31))
"""Comes after every float."""


@jit
def in_order(x):
    """int32 in the order in which torch sorts floats: both zeros are equal, and not-a-number is the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, bits, 0x7FFFFFFF)


@jit
def softmax_of(x, here):
    """(softmax, logsumexp) of each row of x [T, E], over the columns that are here."""
    largest = tl.max(tl.where(here, x, -float("inf")), axis=1)
    powers = tl.where(here, tl.exp(x - largest[:, None]), 0.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    total = tl.sum(powers, axis=1)
    return powers / total[:, None], largest + tl.log(total)  # pyright: ignore[reportArgumentType]


@jit
def sigmoid_of(x, here):
    return tl.where(here, 1 / (1 + tl.exp(-x)), 0.0)


@jit
def log_sigmoid_of(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@jit
def best(rank, score, columns, places, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Scores [T, BK] of the K experts of the highest rank, among equals the lower one first, those experts, and rank
    [T, E] with NONE in their places."""
    scores, experts = tl.zeros((BT, BK), dtype=tl.float32), tl.zeros((BT, BK), dtype=tl.int32)
    for k in range(K):
        expert = tl.argmax(rank, axis=1, tie_break_left=True).to(tl.int32)
        hit = columns[None, :] == expert[:, None]
        place = (places == k)[None, :]
        experts = tl.where(place, expert[:, None], experts)
        scores = tl.where(place, tl.sum(tl.where(hit, score, 0.0), axis=1)[:, None], scores)  # pyright: ignore[reportArgumentType]
        rank = tl.where(hit, NONE, rank)
    return scores, experts, rank


@jit
def route_forward(
    logits_ptr, bias_ptr, padding_ptr, gates_ptr, experts_ptr, sums_ptr, S, E, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    PADDED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gates and experts [T, K], for padding 0 and E; and in sums [P, B, C] each program's share of every expert's
    choices (E), of its probability (E), and of z, entropy and mean square. The grid is (P, B)."""
    sequence, sequences = tl.program_id(1), tl.num_programs(1)
    columns, places = tl.arange(0, BE), tl.arange(0, BK)
    real = (columns < E)[None, :]
    load, probability = tl.zeros((BE,), dtype=tl.float32), tl.zeros((BE,), dtype=tl.float32)
    z = tl.zeros((BT,), dtype=tl.float32)
    entropy, square = z, z
    for start in range(tl.program_id(0) * BT, S, tl.num_programs(0) * BT):
        position = start + tl.arange(0, BT)
        there = position < S
        token = position.to(tl.int64) * sequences + sequence
        live = there
        if PADDED:
            live = there & (tl.load(padding_ptr + token, mask=there, other=1) == 0)
        here = live[:, None] & real
        x = tl.load(logits_ptr + token[:, None] * E + columns[None, :], mask=here, other=0.0)
        probs, log_sum = softmax_of(x, real)
        score = probs
        if SIGMOID:
            score = sigmoid_of(x, real)
            probs, _ = softmax_of(log_sigmoid_of(x), real)
        if AFTER:
            score = x
        ranked = score
        if BIASED:
            ranked = score + tl.load(bias_ptr + columns, mask=columns < E, other=0.0)[None, :]
        if SIGMOID and RENORMALIZE and not AFTER:
            score = log_sigmoid_of(x)
        gates, experts, rank = best(tl.where(real, in_order(ranked), NONE), score, columns, places, K, BT, BK)
        chosen = (places < K)[None, :]
        if AFTER or (SIGMOID and RENORMALIZE):
            gates, _ = softmax_of(gates, chosen)
        elif RENORMALIZE:
            gates = gates / (tl.sum(gates, axis=1) + LITTLE)[:, None]  # pyright: ignore[reportArgumentType]
        target = token[:, None] * K + places[None, :]
        tl.store(gates_ptr + target, tl.where(live[:, None], gates * scale, 0.0), mask=there[:, None] & chosen)
        tl.store(experts_ptr + target, tl.where(live[:, None], experts, E).to(tl.int64), mask=there[:, None] & chosen)
        load += tl.sum(tl.where(here & (rank == NONE), 1.0, 0.0), axis=0)
        probability += tl.sum(tl.where(here, probs, 0.0), axis=0)
        z += tl.where(live, log_sum * log_sum, 0.0)
        # Below TINY p log p is nothing, and a logarithm may take what is close to zero for it.
        log = tl.log(tl.where(probs > LITTLE, probs, 1.0))
        entropy -= tl.sum(tl.where(here, probs * log, 0.0), axis=1)
        square += tl.sum(x * x, axis=1) / E
    sums_ptr += (tl.program_id(0) * sequences + sequence) * (2 * E + 3)
    tl.store(sums_ptr + columns, load, mask=columns < E)
    tl.store(sums_ptr + E + columns, probability, mask=columns < E)
    tl.store(sums_ptr + 2 * E, tl.sum(z, axis=0))
    tl.store(sums_ptr + 2 * E + 1, tl.sum(entropy, axis=0))
    tl.store(sums_ptr + 2 * E + 2, tl.sum(square, axis=0))


@jit
def route_backward(
    logits_ptr, experts_ptr, dgates_ptr, dprobs_ptr, dz_ptr, dlogits_ptr, S, E, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dlogits [T, E] of what reaches the gates [T, K], the sums of probabilities [B, E] and z; 0 for padding, which is
    where expert E was chosen. The grid is (S / BT, B)."""
    sequence, sequences = tl.program_id(1), tl.num_programs(1)
    columns, places = tl.arange(0, BE), tl.arange(0, BK)
    real = (columns < E)[None, :]
    position = tl.program_id(0) * BT + tl.arange(0, BT)
    there = position < S
    token = position.to(tl.int64) * sequences + sequence
    source = token[:, None] * K + places[None, :]
    experts = tl.load(experts_ptr + source, mask=there[:, None] & (places < K)[None, :], other=E).to(tl.int32)
    chosen = experts < E
    live = tl.max(chosen.to(tl.int32), axis=1) > 0  # pyright: ignore[reportOperatorIssue]
    x = tl.load(logits_ptr + token[:, None] * E + columns[None, :], mask=live[:, None] & real, other=0.0)
    softmax, log_sum = softmax_of(x, real)

    # By the scores of the chosen, with AFTER by their logits, or where sigmoids are renormalised by their logarithms.
    x_chosen = tl.load(logits_ptr + token[:, None] * E + experts, mask=chosen, other=0.0)
    dgates = tl.load(dgates_ptr + source, mask=chosen, other=0.0) * scale
    by_chosen = dgates
    if AFTER or (SIGMOID and RENORMALIZE):
        weighed = x_chosen if AFTER else log_sigmoid_of(x_chosen)
        gates, _ = softmax_of(tl.where(live[:, None], weighed, 0.0), chosen | ~live[:, None])
        by_chosen = gates * (dgates - tl.sum(gates * dgates, axis=1)[:, None])  # pyright: ignore[reportArgumentType]
    elif RENORMALIZE:
        score = tl.where(chosen, tl.exp(x_chosen - log_sum[:, None]), 0.0)
        total = (tl.sum(score, axis=1) + LITTLE)[:, None]  # pyright: ignore[reportArgumentType]
        by_chosen = (dgates - (tl.sum(score * dgates, axis=1)[:, None] / total)) / total  # pyright: ignore[reportArgumentType]
    spread = tl.zeros((BT, BE), dtype=tl.float32)
    for k in range(K):
        place = (places == k)[None, :]
        expert = tl.sum(tl.where(place, experts, 0), axis=1)
        value = tl.sum(tl.where(place, by_chosen, 0.0), axis=1)
        spread += tl.where(columns[None, :] == expert[:, None], value[:, None], 0.0)  # pyright: ignore[reportArgumentType]

    dprobs = tl.load(dprobs_ptr + sequence * E + columns, mask=columns < E, other=0.0)[None, :]
    if SIGMOID:
        probs, _ = softmax_of(log_sigmoid_of(x), real)
        slope = sigmoid_of(-x, real)  # of a sigmoid's logarithm
        dx = probs * (dprobs - tl.sum(probs * dprobs, axis=1)[:, None]) * slope  # pyright: ignore[reportArgumentType]
        if AFTER:
            dx += spread
        else:
            dx += spread * slope * (1.0 if RENORMALIZE else sigmoid_of(x, real))
    elif AFTER:
        dx = softmax * (dprobs - tl.sum(softmax * dprobs, axis=1)[:, None]) + spread  # pyright: ignore[reportArgumentType]
    else:
        dscore = dprobs + spread
        dx = softmax * (dscore - tl.sum(softmax * dscore, axis=1)[:, None])  # pyright: ignore[reportArgumentType]
    dx += 2 * tl.load(dz_ptr) * log_sum[:, None] * softmax
    target = dlogits_ptr + token[:, None] * E + columns[None, :]
    tl.store(target, tl.where(live[:, None], dx, 0.0), mask=there[:, None] & real)


def launch(experts: int, top_k: int) -> dict[str, int]:
    """Sizes of a program's tile, of both kernels."""
    width = triton.next_power_of_2(experts)
    tokens, warps = max(1, min(128, TILE // width)), 4 * max(1, width // TILE)
    return {"BT": tokens, "BE": width, "BK": triton.next_power_of_2(top_k), "num_warps": warps}


def _choose_and_weigh(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    padding_T: Tensor | None,
    sequences: int,
    top_k: int,
    sigmoid: bool,
    after: bool,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gates_TK, experts_TK, sums_BC in float64). One operation, so that a pass that is computed again gets all of it
    from the first (parallel.activation_checkpoint): the sums belong to the choice."""
    tokens, experts = logits_TE.shape
    positions, tile = tokens // sequences, launch(experts, top_k)
    gates_TK = logits_TE.new_empty((tokens, top_k))
    experts_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int64)
    # Each sum has one order of its terms, the same every time.
    shares = min(-(-positions // tile["BT"]), max(1, 4 * programs(logits_TE.device) // sequences))
    sums_PBC = logits_TE.new_empty((shares, sequences, 2 * experts + 3))
    if tokens:
        route_forward[(shares, sequences)](
            logits_TE, logits_TE if bias_E is None else bias_E, logits_TE if padding_T is None else padding_T,
            gates_TK, experts_TK, sums_PBC, positions, experts, scale,
            K=top_k, SIGMOID=sigmoid, AFTER=after, RENORMALIZE=renormalize, BIASED=bias_E is not None,
            PADDED=padding_T is not None, **tile,
        )  # fmt: skip
    return gates_TK, experts_TK, sums_PBC.sum(0, dtype=torch.float64)


LIBRARY.define(
    "route(Tensor logits, Tensor? bias, Tensor? padding, int sequences, int top_k, bool sigmoid, bool after, "
    "bool renormalize, float scale) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("route", _choose_and_weigh, "CompositeExplicitAutograd")
choose_and_weigh = torch.ops.switchyard.route.default
MUST_SAVE_OPS.add(choose_and_weigh)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, padding_T: Tensor | None, rule: Rule, sequences: int
    ) -> tuple[Tensor, ...]:
        bias_E, padding_T = (None if t is None else t.contiguous() for t in (bias_E, padding_T))
        logits_TE, experts = logits_TE.contiguous(), logits_TE.shape[1]
        ctx.rule, ctx.sequences = rule, sequences
        options = (rule.top_k, rule.score_function == "sigmoid", rule.after, rule.renormalize, rule.scale)
        gates_TK, experts_TK, sums_BC = choose_and_weigh(logits_TE, bias_E, padding_T, sequences, *options)
        ctx.save_for_backward(logits_TE, experts_TK)
        load_BE, probs_BE, others_B3 = sums_BC.split((experts, experts, 3), dim=1)
        load_BE, (z, entropy, square) = load_BE.long(), others_B3.sum(0).unbind()
        ctx.mark_non_differentiable(experts_TK, load_BE, entropy, square)
        return gates_TK, experts_TK, load_BE, probs_BE.float(), z.float(), entropy, square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates_TK: Tensor, *above: Tensor) -> tuple[Tensor, None, None, None, None]:
        (logits_TE, experts_TK), rule, (_, _, dprobs_BE, dz, _, _) = ctx.saved_tensors, ctx.rule, above
        (tokens, experts), dlogits_TE = logits_TE.shape, torch.empty_like(logits_TE)
        positions, tile = tokens // ctx.sequences, launch(experts, rule.top_k)
        if tokens:
            route_backward[(-(-positions // tile["BT"]), ctx.sequences)](
                logits_TE, experts_TK, dgates_TK.contiguous(), dprobs_BE.contiguous(), dz, dlogits_TE,
                positions, experts, rule.scale,
                K=rule.top_k, SIGMOID=rule.score_function == "sigmoid", AFTER=rule.after, RENORMALIZE=rule.renormalize,
                **tile,
            )  # fmt: skip
        return dlogits_TE, None, None, None, None


def route(logits_TE: Tensor, bias_E: Tensor | None, padding_T: Tensor | None, rule: Rule, sequences: int) -> Routing:
    """ops.routing.FusedRoute.

    Raises:
        ValueError: too many experts for a program's registers.
    """
    assert rule.score_function in FUSED_SCORE_FUNCTIONS
    if logits_TE.shape[1] > LARGEST:
        raise ValueError(f"{logits_TE.shape[1]} experts are too many for one program")
    gates_TK, experts_TK, *router_stats = _Route.apply(logits_TE, bias_E, padding_T, rule, sequences)
    return Routing(gates_TK, experts_TK, RouterStats(*router_stats), logits_TE)
