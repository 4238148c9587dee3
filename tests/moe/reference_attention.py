"""Attention in float64, one token and one head at a time: the part of tests/moe/reference.py that attends.

Legend: D hidden, S sequence, H heads, G key/value groups, N width of a head.
"""

import math

import torch
from torch import Tensor

from conf.schema import ModelConfig

Weights = dict[str, Tensor]
"""float64 parameters by the names that the model gives them."""


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_D / torch.sqrt((x_D * x_D).sum() / len(x_D) + eps) * weight_D


def rotate(x_N: Tensor, position: int, theta: float) -> Tensor:
    """Value i of the first half and value i of the second are the real and imaginary part of a number that turns by
    position * theta^(-2i/N)."""
    half = len(x_N) // 2
    angle = position * theta ** (-2 * torch.arange(half, dtype=torch.float64) / len(x_N))
    turned = torch.complex(x_N[:half], x_N[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag))


def documents(positions_S: list[int], document_mask: bool) -> list[int]:
    """The document of each token: a position 0 starts one. Without the mask all is one document."""
    return [sum(p == 0 for p in positions_S[: s + 1]) if document_mask else 0 for s in range(len(positions_S))]


def attention(
    x_SD: Tensor, weights: Weights, model: ModelConfig, positions_S: list[int], document_mask: bool, rope: bool = True
) -> Tensor:
    """One sequence. The rows of qkv are, for each key/value group, its queries, their gates, its key
    and its value.

    Args:
        rope: whether there is a rotary embedding.
    """
    width = model.head_dim or model.hidden_size // model.num_attention_heads
    scale = model.attention_multiplier or 1 / math.sqrt(width)
    groups = model.num_query_groups or model.num_attention_heads
    queries = model.num_attention_heads // groups
    rows_SGR = [(weights["qkv.weight"] @ x_D + weights.get("qkv.bias", 0.0)).view(groups, -1) for x_D in x_SD]
    gates = rows_SGR[0].shape[1] - (queries + 2) * width  # of a group, between its queries and its key
    gates_SGR = [rows_GR[:, queries * width : queries * width + gates] for rows_GR in rows_SGR]
    projected_SGHN = [
        torch.cat([rows_GR[:, : queries * width], rows_GR[:, queries * width + gates :]], 1).view(groups, -1, width)
        for rows_GR in rows_SGR
    ]
    if model.qk_norm in ("head", "full"):
        projected_SGHN = [norm_heads(heads_GHN, weights, model, queries) for heads_GHN in projected_SGHN]
    if model.clip_qkv:
        projected_SGHN = [heads.clamp(-model.clip_qkv, model.clip_qkv) for heads in projected_SGHN]
    document_S = documents(positions_S, document_mask)
    window, chunk = model.sliding_window or len(x_SD), model.attention_chunk_size or len(x_SD)
    chunk_S = [position // chunk for position in (positions_S if document_mask else range(len(x_SD)))]

    def placed(x_N: Tensor, position: int) -> Tensor:
        if not rope:
            return x_N
        x_N = rotate(x_N, position, model.rope_theta)
        return rms_norm(x_N, torch.ones_like(x_N), model.norm_eps) if model.qk_norm == "l2" else x_N

    rows = []
    for s, position in enumerate(positions_S):
        seen = [
            u for u in range(s + 1) if document_S[u] == document_S[s] and chunk_S[u] == chunk_S[s] and s - u < window
        ]
        heads = []
        for g in range(groups):
            keys = [placed(projected_SGHN[u][g, queries], positions_S[u]) for u in seen]
            values = [projected_SGHN[u][g, queries + 1] for u in seen]
            for h in range(queries):
                query_N = placed(projected_SGHN[s][g, h], position)
                if not rope and model.attention_temperature:
                    steps = (position + 1) // model.attention_temperature_tokens
                    query_N = query_N * (1 + model.attention_temperature * math.log(1 + steps))
                scores = torch.exp(torch.stack([query_N @ key_N for key_N in keys]) * scale)
                sink = torch.exp(weights["sinks"][g * queries + h]) if model.attention_sinks else 0.0
                total = scores.sum() + sink
                attended_N = sum(score / total * value_N for score, value_N in zip(scores, values, strict=True))
                if model.attention_output_gate:
                    gate = gates_SGR[s][g].view(queries, -1)[h]  # a number, or one for each dimension
                    attended_N = attended_N / (1 + torch.exp(-gate))
                heads.append(attended_N)
        rows.append(weights["out.weight"] @ torch.cat(heads) + weights.get("out.bias", 0.0))
    return torch.stack(rows)


def norm_heads(heads_GHN: Tensor, weights: Weights, model: ModelConfig, queries: int) -> Tensor:
    """The queries and keys of a token normalised, the values as they are."""
    parts = {"q": heads_GHN[:, :queries], "k": heads_GHN[:, queries : queries + 1]}
    normed = []
    for name, part_GHN in parts.items():
        weight, heads = (
            weights[f"{name}_layernorm.weight"] + model.norm_zero_centered,
            part_GHN.reshape(-1, part_GHN.shape[-1]),
        )
        rows = [heads.flatten()] if model.qk_norm == "full" else list(heads)
        normed.append(torch.cat([rms_norm(row, weight, model.norm_eps) for row in rows]).view(part_GHN.shape))
    return torch.cat([*normed, heads_GHN[:, queries + 1 :]], 1)
