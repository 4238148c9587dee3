"""The layers that low-rank adapters can be added to (lora.target), known without building a model."""

import difflib
import fnmatch
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

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


@dataclass(frozen=True)
class AdaptedKind:
    """A layer that has adapters in some sparse, or some dense blocks."""

    layer: AdaptedLayer
    """Its name is that within a block: attention.q, for example."""
    sparse: bool
    blocks: frozenset[int]
    """Their indices in the model."""
    share: float
    """Of the model's sparse, or of its dense blocks."""

    @property
    def module(self) -> str:
        """attention, ffn, ffn.experts or ffn.shared.ffn."""
        return self.layer.name.rpartition(".")[0]


def is_adapter(parameter: str) -> bool:
    """Whether a logical name is that of an adapter's parameter."""
    return ".lora." in parameter


def scale_of(lora: LoraConfig) -> float:
    """What B A is multiplied by."""
    assert lora.rank is not None
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def adaptable_layers(model: ModelConfig) -> Iterator[AdaptedLayer]:
    """All of them, without those of layers for multi-token prediction."""
    kinds = _kinds(model)
    for index, sparse in enumerate(map(model.is_sparse, range(model.num_layers))):
        yield from _of_block(kinds, index, sparse=sparse)


class _Kinds(NamedTuple):
    """The layers of a block, with their names within it."""

    attention: tuple[AdaptedLayer, ...]
    sparse: tuple[AdaptedLayer, ...]
    dense: tuple[AdaptedLayer, ...]


def _kinds(model: ModelConfig) -> _Kinds:
    experts = [*_feed_forward(model, "ffn.experts.", model.expert_width, model.moe.num_experts)]
    if model.moe.num_shared_experts:
        experts += _feed_forward(model, "ffn.shared.ffn.", model.shared_width)
    dense = _feed_forward(model, "ffn.", model.ffn_hidden_size)
    return _Kinds(tuple(_attention(model, "attention.")), tuple(experts), tuple(dense))


def _of_block(kinds: _Kinds, index: int, *, sparse: bool) -> Iterator[AdaptedLayer]:
    for layer in (*kinds.attention, *(kinds.sparse if sparse else kinds.dense)):
        yield replace(layer, name=f"layers.{index}.{layer.name}")


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
    return list(_selection(model, lora).layers)


def adapted_kinds(model: ModelConfig, lora: LoraConfig) -> tuple[AdaptedKind, ...]:
    """adapted_layers, those of all blocks that are alike together: a few, however many layers the model has."""
    return () if lora.rank is None else _selection(model, lora).kinds


class _Selection(NamedTuple):
    layers: tuple[AdaptedLayer, ...]
    kinds: tuple[AdaptedKind, ...]


def _selection(model: ModelConfig, lora: LoraConfig) -> _Selection:
    blocks = tuple(map(model.is_sparse, range(model.num_layers)))
    return _selected(_kinds(model), blocks, lora.rank or 0, lora.dora, tuple(lora.target))


@functools.lru_cache(maxsize=64)  # a plan asks for those of one model in every candidate
def _selected(kinds: _Kinds, blocks: tuple[bool, ...], rank: int, dora: bool, target: tuple[str, ...]) -> _Selection:
    """Args:
    blocks: whether each is sparse.
    """
    every = (layer for index, sparse in enumerate(blocks) for layer in _of_block(kinds, index, sparse=sparse))
    layers = {layer.name: layer for layer in every}
    chosen = set[str]()
    for pattern in target:
        matched = fnmatch.filter(layers, pattern.removeprefix("!"))
        if not matched:
            near = _nearest(pattern.removeprefix("!"), layers)
            raise ValueError(f"lora.target names layers of the model, but {pattern} matches none; {near}")
        chosen = chosen - set(matched) if pattern.startswith("!") else chosen | set(matched)
    if not chosen:
        raise ValueError("lora.target selects a layer, but none is left; nearest: lora.target=['*'] or lora.rank=null")
    found = [layer for name, layer in layers.items() if name in chosen]
    if dora and (experts := next((layer.name for layer in found if layer.experts), None)):
        raise ValueError(
            f"lora.dora needs adapters of linear layers alone, but lora.target selects {experts}: peft, which loads "
            "adapters, has no DoRA for routed experts; nearest: lora.target=['*','!*.experts.*'] or lora.dora=false"
        )
    narrowest = min(found, key=lambda layer: min(layer.inner, layer.outer))
    width = min(narrowest.inner, narrowest.outer)
    if rank > width:
        raise ValueError(
            f"lora.rank <= the dimensions of every adapted layer, but {rank} > {width}: {narrowest.name} is "
            f"{narrowest.outer} x {narrowest.inner}; nearest: lora.rank={width}, or exempt it in lora.target"
        )
    return _Selection(tuple(found), _by_kind(found, blocks))


def _by_kind(layers: list[AdaptedLayer], blocks: tuple[bool, ...]) -> tuple[AdaptedKind, ...]:
    alike: dict[tuple[AdaptedLayer, bool], list[int]] = {}
    for layer in layers:
        inside = replace(layer, name=layer.name.split(".", 2)[2])
        alike.setdefault((inside, blocks[layer.layer]), []).append(layer.layer)
    return tuple(
        AdaptedKind(inside, sparse, frozenset(found), len(found) / blocks.count(sparse))
        for (inside, sparse), found in alike.items()
    )


def _nearest(pattern: str, names: dict[str, AdaptedLayer]) -> str:
    """The names in any layer that are most similar to a pattern."""
    parts = pattern.split(".")
    short = list(dict.fromkeys("*." + ".".join(name.split(".")[2:]) for name in names))
    tail = ".".join(parts[2:]) if parts[0] == "layers" and len(parts) > 2 else pattern.removeprefix("*.")
    near = difflib.get_close_matches("*." + tail, short, 3, 0.5)
    every = f"there are {', '.join(short)}"
    return f"nearest: {', '.join(near)} ({every})" if near else every
