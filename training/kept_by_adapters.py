"""What low-rank adapters keep of a micro-batch for the backward pass, and what frozen products do not, as formulas
beside those of training.kept_activations."""

from typing import TYPE_CHECKING

from conf.lora_layers import AdaptedLayer, adapted_kinds
from training.adapters import share_adapted

if TYPE_CHECKING:
    from training.kept_activations import Activations


def kept_by_adapters(of: "Activations", kind: str, *, sparse: bool) -> float:
    """Bytes that the adapters of attention, or of the feed-forward layer (ffn), keep in a sparse or a dense layer: the
    products with A, which B multiplies; with lora.dropout also the factors of their inputs, and the inputs times these;
    with lora.dora their outputs before they are scaled."""
    kinds = [
        found
        for found in adapted_kinds(of.model, of.config.lora)
        if found.sparse == sparse and found.layer.name.split(".")[0] == kind
    ]
    return of.value * sum(found.share * _values(of, found.layer) for found in kinds)


def _values(of: "Activations", layer: AdaptedLayer) -> float:
    """That an adapter keeps."""
    lora, tp = of.config.lora, of.layout.tp
    rank, inner = lora.rank or 0, 2 * layer.inner if lora.dropout else 0
    if layer.experts:
        return of.rows * (rank + inner / (of.layout.etp if layer.sharded == "inner" else 1))
    scaled = layer.outer if lora.dora else 0
    if layer.sharded == "outer":  # the product is gathered under sequence parallelism
        return of.tokens * (rank + scaled / tp) + of.outside * inner
    if layer.sharded == "inner":  # and here scattered
        return of.outside * (rank + scaled) + of.tokens * inner / tp
    return of.outside * (rank + inner + scaled)


def unread_inputs(of: "Activations", again: list[str], *, sparse: bool) -> float:
    """Bytes of inputs of a layer's frozen products that training.kept_activations counts, although no adapter reads
    them, or only after dropout.

    Args:
        again: as model.recompute.
    """
    model, config = of.model, of.config
    if config.lora.rank is None:
        return 0.0

    def unread(name: str, *parts: str) -> float:
        found = share_adapted(config, name, sparse=sparse)
        return 1.0 if config.lora.dropout else 1.0 - max(found.get(part, 0.0) for part in parts)

    norm = 0.0 if "norm" in again else of.outside * model.hidden_size
    # Of relu the activated values are what its own gradient needs.
    activated = 0.0 if "activation" in again or model.activation == "relu" else 1.0
    values = norm * unread("attention", "q", "gate", "k", "v", "q_down", "kv_down")
    values += of.tokens / of.layout.tp * model.output_width * unread("attention", "out")
    if not sparse:
        values += norm * unread("ffn", "gate", "up")
        values += activated * of.tokens / of.layout.tp * model.ffn_hidden_size * unread("ffn", "down")
    elif "moe" not in again:
        if model.moe.num_shared_experts:
            width = model.shared_width / of.layout.tp
            values += activated * of.tokens * width * unread("ffn.shared.ffn", "down")
        if of.is_separate:
            width = model.expert_width / of.layout.etp
            values += of.rows * model.hidden_size * unread("ffn.experts", "gate", "up")
            values += activated * of.rows * width * unread("ffn.experts", "down")
    return of.value * values
