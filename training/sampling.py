"""Sampling of the next token in text generation. Shapes: V vocabulary, K kept tokens."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are validated before PyTorch is imported
    import torch
    from torch import Tensor


def check_sampling(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for invalid sampling settings."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be 0 (always the likeliest token) or above, for example 0.8")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; null keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; null keeps every token")


def likeliest_tokens(logits_RV: "Tensor", wanted: Sequence[bool]) -> list[int]:
    """The most likely token of each row, as `next_token` with temperature 0.

    Args:
        wanted: rows whose logits have a meaning.
    """
    largest_R, likeliest_R = logits_RV.max(dim=1)
    for largest, matters in zip(largest_R.tolist(), wanted, strict=True):
        if matters:
            _check_largest(largest)
    return likeliest_R.tolist()


def _check_largest(logit: float) -> None:
    if not math.isfinite(logit):
        raise ValueError(f"no token can be drawn: the largest logit is {logit}")


def next_token(
    logits_V: "Tensor", *, temperature: float, top_k: int | None, top_p: float | None, generator: "torch.Generator"
) -> int:
    """Samples a token from the logits `[V]`; the same generator state gives the same token.

    The logits are divided by the temperature. `top_k` keeps the k most likely tokens. `top_p` then keeps the smallest
    set of the most likely of these whose probability among them reaches p (Holtzman et al. 2020, arXiv:1904.09751, eq.
    2 and 3). Ties are broken in favor of the lower id. Temperature 0 returns the most likely token and does not use the
    generator, which must be on the device of the logits.

    Raises ValueError for settings that `check_sampling` rejects and for logits that are NaN or +inf. A token with a
    logit of -inf is never sampled.
    """
    import torch

    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    largest, likeliest = logits_V.max(dim=0)  # NaN if one of them is; -inf means no token is allowed
    _check_largest(largest.item())
    if temperature == 0:
        return int(likeliest)  # of equal ones the first
    # The largest logit is subtracted before the division, which could otherwise overflow at low temperatures.
    scaled_V = (logits_V.double() - largest.double()) / temperature
    everything = top_k is None and top_p is None
    probability_V = torch.softmax(scaled_V, dim=0) if everything else _kept(scaled_V, top_k, top_p)
    # In the order of the vocabulary: rounding that reorders nearly equal tokens would change a draw among sorted ones.
    return int(torch.multinomial(probability_V, 1, generator=generator))


def _kept(scaled_V: "Tensor", top_k: int | None, top_p: float | None) -> "Tensor":
    """The probabilities [V] of the tokens that top_k and top_p keep; 0 for the others."""
    import torch

    sorted_V, token_V = torch.sort(scaled_V, descending=True, stable=True)
    probability_K, token_K = torch.softmax(sorted_V[:top_k], dim=0), token_V[:top_k]
    if top_p is not None:
        before_K = torch.cumsum(probability_K, dim=0).roll(1)  # total probability of the more likely tokens
        before_K[0] = 0.0
        probability_K = torch.where(before_K < top_p, probability_K, 0.0)
    return torch.zeros_like(scaled_V).scatter_(0, token_K, probability_K)
