"""The layers that low-rank adapters can be added to (lora.target), known without building a model."""

import difflib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from conf.extensions import input_projections
from conf.lora_schema import LoraConfig
from conf.model_schema import ModelConfig


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer, or that of every routed expert of a block."""

    name: str
    """layers.N.attention.q, for example."""
    inner: int
    outer: int
    sharded: str | None
    """Which dimension is sharded over tensor-parallel ranks, or those of experts: inner, outer or None."""
    experts: int = 0
    """Number of routed experts. 0: it is a single layer."""

    @property
    def layer(self) -> int:
        """Index of the block in the model."""
        return int(self.name.split(".")[1])

    def parameter(self, factor: str) -> str:
        """The logical name of a, b or, of DoRA, m: what is added to the lengths of the weight's rows."""
        module, _, part = self.name.rpartition(".")
        return f"{module}.lora.{part}.{factor}"


def is_adapter(parameter: str) -> bool:
    """Whether a logical name is that of an adapter's parameter."""
    return ".lora." in parameter


def scale_of(lora: LoraConfig) -> float:
    """What B A is multiplied by."""
    assert lora.rank is not None
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def adaptable_layers(model: ModelConfig) -> Iterator[AdaptedLayer]:
    """All of them, without those of layers for multi-token prediction."""
    for index in range(model.num_layers):
        yield from _attention(model, f"layers.{index}.attention.")
        ffn = f"layers.{index}.ffn."
        if not model.is_sparse(index):
            yield from _feed_forward(model, ffn, model.ffn_hidden_size)
            continue
        yield from _feed_forward(model, f"{ffn}experts.", model.expert_width, model.moe.num_experts)
        if model.moe.num_shared_experts:
            yield from _feed_forward(model, f"{ffn}shared.ffn.", model.shared_width)


def _attention(model: ModelConfig, prefix: str) -> Iterator[AdaptedLayer]:
    d = model.hidden_size
    if model.kv_lora_rank is None:
        widths = {"q": model.query_width, "gate": model.gate_width, "k": model.key_width, "v": model.key_width}
        yield from (AdaptedLayer(prefix + part, d, width, "outer") for part, width in widths.items() if width)
    else:
        if model.q_lora_rank is None:
            yield AdaptedLayer(f"{prefix}q", d, model.query_width, "outer")
        else:
            yield AdaptedLayer(f"{prefix}q_down", d, model.q_lora_rank, None)
            yield AdaptedLayer(f"{prefix}q_up", model.q_lora_rank, model.query_width, "outer")
        yield AdaptedLayer(f"{prefix}kv_down", d, model.kv_lora_rank + model.qk_rope_head_dim, None)
        up = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
        yield AdaptedLayer(f"{prefix}kv_up", model.kv_lora_rank, up, "outer")
    yield AdaptedLayer(f"{prefix}out", model.output_width, d, "inner")


def _feed_forward(model: ModelConfig, prefix: str, width: int, experts: int = 0) -> Iterator[AdaptedLayer]:
    into = ("gate", "up") if input_projections(model.activation) == 2 else ("up",)
    yield from (AdaptedLayer(prefix + part, model.hidden_size, width, "outer", experts) for part in into)
    yield AdaptedLayer(f"{prefix}down", width, model.hidden_size, "inner", experts)


def adapted_layers(model: ModelConfig, lora: LoraConfig) -> list[AdaptedLayer]:
    """Those that lora.target selects; none with lora.rank=null.

    Raises:
        ValueError: a pattern matches no layer, no layer is left, or the rank exceeds a dimension of one.
    """
    if lora.rank is None:
        return []
    layers = {layer.name: layer for layer in adaptable_layers(model)}
    chosen = set[str]()
    for pattern in lora.target:
        matched = fnmatch.filter(layers, pattern.removeprefix("!"))
        if not matched:
            near = _nearest(pattern.removeprefix("!"), layers)
            raise ValueError(f"lora.target names layers of the model, but {pattern} matches none; {near}")
        chosen = chosen - set(matched) if pattern.startswith("!") else chosen | set(matched)
    if not chosen:
        raise ValueError("lora.target selects a layer, but none is left; nearest: lora.target=['*'] or lora.rank=null")
    found = [layer for name, layer in layers.items() if name in chosen]
    if lora.dora and (experts := next((layer.name for layer in found if layer.experts), None)):
        raise ValueError(
            f"lora.dora needs adapters of linear layers alone, but lora.target selects {experts}: peft, which loads "
            "adapters, has no DoRA for routed experts; nearest: lora.target=['*','!*.experts.*'] or lora.dora=false"
        )
    narrowest = min(found, key=lambda layer: min(layer.inner, layer.outer))
    width = min(narrowest.inner, narrowest.outer)
    if lora.rank > width:
        raise ValueError(
            f"lora.rank <= the dimensions of every adapted layer, but {lora.rank} > {width}: {narrowest.name} is "
            f"{narrowest.outer} x {narrowest.inner}; nearest: lora.rank={width}, or exempt it in lora.target"
        )
    return found


def _nearest(pattern: str, names: dict[str, AdaptedLayer]) -> str:
    """The names in any layer that are most similar to a pattern."""
    parts = pattern.split(".")
    short = list(dict.fromkeys("*." + ".".join(name.split(".")[2:]) for name in names))
    tail = ".".join(parts[2:]) if parts[0] == "layers" and len(parts) > 2 else pattern.removeprefix("*.")
    near = difflib.get_close_matches("*." + tail, short, 3, 0.5)
    every = f"there are {', '.join(short)}"
    return f"nearest: {', '.join(near)} ({every})" if near else every
