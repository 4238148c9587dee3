"""Computes the parameter count and FLOPs of a model from its configuration.

Legend: L layers, D hidden, V vocabulary, E experts, K choices per token, S sequence, H heads, N width of a
head.
"""

from dataclasses import dataclass

from conf.extensions import input_projections
from conf.schema import ModelConfig


@dataclass(frozen=True)
class Cost:
    """Parameters and FLOPs of a model."""

    total: int
    """All parameters."""
    active: int
    """Parameters that a token uses on average: all but those of experts that it is not routed to."""
    flops_per_token: float
    """Forward and backward, at the given sequence length."""


def experts_per_token(model: ModelConfig) -> float:
    """Average number of experts that compute a token in training: top_k, unless the capacity of all experts together is
    less; with expert-choice routing capacity_factor * top_k."""
    moe = model.moe
    if moe.load_balancing == "expert_choice" and moe.capacity_factor is not None:
        return min(moe.num_experts, moe.top_k * moe.capacity_factor)
    return moe.top_k * min(1.0, 1.0 if moe.capacity_factor is None else moe.capacity_factor)


def attention_matrices(model: ModelConfig) -> list[tuple[int, int, str | None]]:
    """(inner dimension, outer dimension, which of them is sharded over tensor-parallel ranks: inner, outer or None) of
    the matrices of an attention layer."""
    d, heads = model.hidden_size, model.num_attention_heads
    out: tuple[int, int, str | None] = (model.output_width, d, "inner")
    if model.kv_lora_rank is None:
        return [(d, model.qkv_width, "outer"), out]
    up = heads * (model.qk_nope_head_dim + model.v_head_dim)
    latent = [(d, model.kv_lora_rank + model.qk_rope_head_dim, None), (model.kv_lora_rank, up, "outer"), out]
    if model.q_lora_rank is None:
        return [(d, model.query_width, "outer"), *latent]
    return [(d, model.q_lora_rank, None), (model.q_lora_rank, model.query_width, "outer"), *latent]


def attention_vectors(model: ModelConfig) -> tuple[int, int]:
    """Parameters of an attention layer outside its matrices: (sharded over tensor-parallel ranks, replicated on
    them)."""
    if model.kv_lora_rank is not None:
        return 0, model.kv_lora_rank + (model.q_lora_rank or 0)
    sharded = model.query_width + model.key_width if model.qk_norm == "full" else 0
    sharded += model.qkv_width if model.attention_bias else 0
    sharded += model.num_attention_heads if model.attention_sinks else 0
    replicated = 2 * model.head_width if model.qk_norm == "head" else 0
    return sharded, replicated + (model.hidden_size if model.attention_output_bias else 0)


def ffn_biases(model: ModelConfig, width: int) -> int:
    """Parameters of the biases of a dense feed-forward layer of a hidden size: those of its input projections are
    sharded over tensor-parallel ranks."""
    return input_projections(model.activation) * width + model.hidden_size if model.ffn_bias else 0


def attention_span(model: ModelConfig, sequence_length: int) -> float:
    """Summed over layers, those for multi-token prediction included: twice the mean number of keys that a query sees,
    its own counted as half, which is S in a layer that attends to all earlier tokens, as PaLM's formula counts them."""
    s, layers = sequence_length, model.num_layers + model.mtp_num_layers
    local = sum(map(model.is_local, range(layers)))
    if model.attention_chunk_size is not None:
        span = min(s, model.attention_chunk_size)
    else:
        window = min(s, model.sliding_window or s)
        span = (window**2 + (s - window) * (2 * window - 1)) / s
    return (layers - local) * s + local * span


def model_cost(model: ModelConfig, sequence_length: int) -> Cost:
    """Counts parameters and FLOPs. FLOPs per token are 6 per active parameter in a matrix product, plus 12 L H N S for
    attention scores (PaLM, arXiv:2204.02311, appendix B), in layers with local attention in proportion to the keys that
    are seen; N is the mean of the widths of a key and of a value. Recomputation of activations is not counted."""
    d, moe = model.hidden_size, model.moe
    attention = sum(inner * outer for inner, outer, _ in attention_matrices(model))
    gates = input_projections(model.activation)
    ffn, expert, shared = (
        d * width * (gates + 1) for width in (model.ffn_hidden_size, model.expert_width, model.shared_width)
    )
    biases = gates * model.expert_width + d if moe.expert_bias else 0
    norms = 2 * d
    further = model.mtp_num_layers
    layers, sparse = model.num_layers + further, len(model.routed_layers)
    dense = layers - sparse
    router = d * moe.num_experts
    vectors = sum(attention_vectors(model)) * layers + sparse * (moe.num_experts if moe.router_bias else 0)
    vectors += (2 * layers + 1 + 3 * further) * d if model.norm == "layernorm" else 0
    vectors += dense * ffn_biases(model, model.ffn_hidden_size)
    vectors += sparse * ffn_biases(model, model.shared_width) if moe.num_shared_experts else 0
    vectors += model.vocab_size if model.head_bias and not model.reward_head else 0
    shared += d if moe.shared_expert_gate else 0
    outside = sparse * (router + shared) + layers * (attention + norms) + dense * ffn + d
    outside += further * (2 * d * d + 3 * d)  # the projection of two hidden states, and three norms
    table, head = model.vocab_size * d, model.output_size * d
    not_multiplied = (table if model.ties_head else table + head) + vectors
    total = outside + sparse * moe.num_experts * (expert + biases) + not_multiplied
    visited = experts_per_token(model)
    active = outside + round(sparse * visited * (expert + biases)) + not_multiplied
    # The embedding is a lookup, the output layer a product, of each prediction. The small contribution of norms is
    # included.
    multiplied = outside + sparse * visited * expert + (1 + further) * head
    scores = (model.query_width + model.output_width) * attention_span(model, sequence_length)
    return Cost(total, active, 6.0 * multiplied + 6.0 * scores)
