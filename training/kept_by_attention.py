"""What attention keeps of a micro-batch for the backward pass, as formulas beside those of
training.kept_activations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.kept_activations import Activations

FLOAT = 4
"""Bytes of what is computed in fp32 whatever the precision is."""


def kept_by_attention(of: "Activations") -> float:
    """Bytes that attention keeps in a layer, without its input."""
    model, tp, value = of.model, of.layout.tp, of.value
    query, key, heads = model.query_width, model.key_width, model.num_attention_heads
    if model.kv_lora_rank is not None:
        return _latent_attention(of)
    kept = value * _core(of, query, key) + FLOAT * heads  # the log-sum-exps
    if model.attention_output_gate is not None:  # their projection and sigmoid, and the gated output
        kept += value * (2 * model.gate_width + query)
    if model.qk_norm is not None:  # inputs of its norms, and their scales
        inputs = query + key
        if _norms_projection(of):  # per head, queries are laid out anew where a group has several
            inputs = query if model.qk_norm == "head" and model.query_groups < heads else 0
        normed = _with_rope(of) if model.qk_norm == "l2" else 1.0
        kept += normed * value * inputs
        kept += normed * FLOAT * (2 * tp if model.qk_norm == "full" else heads + model.query_groups)
    if model.attention_temperature is not None:
        kept += (1 - _with_rope(of)) * (value * query + tp * FLOAT)
    if model.clip_qkv is not None:  # inputs and outputs of clipping
        kept += value * (query + (2 if model.qk_norm else 1) * key)
    if model.attention_multiplier is not None:
        kept += tp * FLOAT * model.rotary_width
    return of.tokens * kept / tp


def _with_rope(of: "Activations") -> float:
    """Share of the layers that have a rotary embedding."""
    if of.model.no_rope_every is None:
        return 1.0
    return sum(map(of.model.has_rope, range(of.model.num_layers))) / of.model.num_layers


def _norms_projection(of: "Activations") -> bool:
    """Whether the norms of queries and keys read the fused projection itself, as a CPU's do where they can."""
    of_one_group = of.model.qk_norm == "full" and of.model.query_groups == of.layout.tp
    return not of.on_gpu and (of.model.qk_norm == "head" or of_one_group)


def _merges_heads(of: "Activations") -> bool:
    """Whether the output of attention, in memory one head after the other, is laid out anew for the projection."""
    return of.model.num_attention_heads > of.layout.tp


def _core(of: "Activations", query: int, key: int) -> float:
    """Values per token of the kernel: queries and keys after the rotary embedding, values, and the output."""
    model, cp, several = of.model, of.layout.cp, of.config.train.micro_batch_size > 1
    if cp > 1:  # queries exchanged, the output, it exchanged, and the keys and values of the sequence
        if of.on_gpu:  # those that the two pieces see
            return 3.0 * query + 2 * key * (cp + 0.5)
        return 3.0 * query + 2 * key * cp + _norms_projection(of) * (query + 2 * key)
    # Values are part of the fused projection. Queries and output are laid out as the l2 norm leaves them.
    whole = 3.0 * query + 3 * key + query * (_merges_heads(of) and model.qk_norm != "l2")
    # Without rotary embedding the projection itself, unless queries have to be laid out anew, or what norms return.
    plain = 2.0 * query + 2 * key + query * (1 < model.query_groups < model.num_attention_heads)
    plain = plain if model.qk_norm in (None, "l2") else 3.0 * query + 3 * key
    whole = _with_rope(of) * whole + (1 - _with_rope(of)) * plain
    if not of.on_gpu:
        return whole
    packed = 2.0 * query + 2 * key if several else 3.0 * query + 3 * key
    varlen = of.config.data.document_mask or model.attention_sinks
    local = 1.0 if varlen else len(model.local_layers) / model.num_layers
    return local * packed + (1 - local) * whole


def _latent_attention(of: "Activations") -> float:
    model, tp, value = of.model, of.layout.tp, of.value
    assert model.kv_lora_rank is not None
    query, out, heads = model.query_width, model.output_width, model.num_attention_heads
    # Queries, keys, padded values and the padded output; or, where values are as wide as keys, those of the projection
    # that they are part of, and the output; and, of several heads, it laid out anew.
    nope = heads * model.qk_nope_head_dim
    core = 4 * query if model.v_head_dim < model.head_width else 2 * query + nope + 2 * out
    core += out * _merges_heads(of)
    down = model.q_lora_rank or 0
    latent = value * 2 * (down + model.kv_lora_rank) + FLOAT * (1 + bool(down))
    latent += 0 if of.on_gpu else value * model.qk_rope_head_dim
    scaled = bool(model.rope_scaling.mscale_all_dim)
    per_token = (value * core + FLOAT * heads) / tp + scaled * FLOAT * model.rotary_width
    return of.tokens * per_token + of.outside * latent
