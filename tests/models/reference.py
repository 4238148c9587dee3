"""The decoder in float64, one token at a time, from the layers of tests/moe/reference.py.

Legend: S sequence, B batch, D hidden, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from conf.schema import ModelConfig
from tests.moe.reference import Sparse, dense_layer, norm_all, sparse_layer, under
from tests.moe.reference_attention import Weights, attention


def block(
    x_BSD: Tensor,
    part: Weights,
    model: ModelConfig,
    positions_BS: Tensor,
    document_mask: bool,
    *,
    layer: int,
    routed: list[tuple[int, int]] | None = None,
) -> tuple[Tensor, Sparse | None]:
    """A layer's output, and what its experts did.

    Args:
        layer: counted from 0; decides on local attention and rotary embedding.
        routed: the tokens (s, b) that a router sees, in order; the experts add nothing to others. None: all.
    """
    batch, sequence = positions_BS.shape
    rope = model.no_rope_every is None or (layer + 1) % model.no_rope_every > 0
    if layer not in model.local_layers:
        model = replace(model, sliding_window=None, attention_chunk_size=None)
    normed_BSD = norm_all(x_BSD, part, "attention_norm", model)
    attended = [
        attention(x_SD, under(part, "attention."), model, positions_S, document_mask, rope)
        for x_SD, positions_S in zip(normed_BSD, positions_BS.tolist(), strict=True)
    ]
    x_BSD = x_BSD + model.residual_multiplier * torch.stack(attended)
    normed_BSD = norm_all(x_BSD, part, "ffn_norm", model)
    did = None
    if "ffn.router.weight" in part:
        # The order in which tokens fill the experts: by position, and at one position by sequence of the batch.
        routed = [(s, b) for s in range(sequence) for b in range(batch)] if routed is None else routed
        x_TD, order = torch.stack([normed_BSD[b, s] for s, b in routed]), [b for _, b in routed]
        did = sparse_layer(
            x_TD, under(part, "ffn."), model.moe, model.activation_name, model.moe.capacity_factor, order
        )
        of = dict(zip(routed, did.out_TD, strict=True))
        nothing = torch.zeros_like(x_BSD[0, 0])
        rows = [[of.get((s, b), nothing) for s in range(sequence)] for b in range(batch)]
    else:
        rows = [[dense_layer(x_D, under(part, "ffn."), model.activation_name) for x_D in x_SD] for x_SD in normed_BSD]
    out_BSD = torch.stack([torch.stack(row) for row in rows])
    return x_BSD + model.residual_multiplier * out_BSD, did


def embed(weights: Weights, model: ModelConfig, tokens_BS: Tensor) -> Tensor:
    return weights["embedding.weight"][tokens_BS] * model.embedding_multiplier


def final_states(
    weights: Weights, model: ModelConfig, tokens_BS: Tensor, positions_BS: Tensor, document_mask: bool = False
) -> tuple[Tensor, dict[int, Sparse]]:
    """Output of the final norm [B, S, D] of a training pass, and what each sparse layer did."""
    sparse: dict[int, Sparse] = {}
    x_BSD = embed(weights, model, tokens_BS)
    for layer in range(model.num_layers):
        part = under(weights, f"layers.{layer}.")
        x_BSD, did = block(x_BSD, part, model, positions_BS, document_mask, layer=layer)
        if did is not None:
            sparse[layer] = did
    return norm_all(x_BSD, weights, "final_norm", model), sparse


def head(weights: Weights, model: ModelConfig, final_BSD: Tensor) -> Tensor:
    """Logits [B, S, V]."""
    head_VD = weights.get("head.weight", weights["embedding.weight"])
    logits_BSV = final_BSD @ head_VD.t() * model.logit_multiplier + weights.get("head.bias", 0.0)
    cap = model.logit_softcap
    return logits_BSV if cap is None else cap * torch.tanh(logits_BSV / cap)


def decoder(
    weights: Weights, model: ModelConfig, tokens_BS: Tensor, positions_BS: Tensor, document_mask: bool = False
) -> tuple[Tensor, dict[int, Sparse]]:
    """Logits [B, S, V] of a training pass, and what each sparse layer did."""
    final_BSD, sparse = final_states(weights, model, tokens_BS, positions_BS, document_mask)
    return head(weights, model, final_BSD), sparse


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """[B, S] in nats."""
    rows = [
        [torch.log(torch.exp(logits_V).sum()) - logits_V[label] for logits_V, label in zip(*pair, strict=True)]
        for pair in zip(logits_BSV, labels_BS.tolist(), strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])
