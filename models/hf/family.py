"""Describes a Hugging Face model family: how config.json maps to settings, and its tensors to parameters.

Legend: D hidden size, F hidden size of a feed-forward layer, H query heads, G key/value heads, N head dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig

HfConfig = Mapping[str, Any]
"""What a config.json contains."""


@dataclass(frozen=True)
class Layout:
    """How a parameter, or the slice of it that belongs to one expert, is composed of Hugging Face tensors. Both
    directions only rearrange elements, and also work on meta tensors."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], list[Tensor]]


AS_IS = Layout(lambda parts, _: parts[0], lambda whole, _: [whole])
TRANSPOSED = Layout(lambda parts, _: parts[0].t(), lambda whole, _: [whole.t()])


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    return torch.cat([part.unflatten(0, (model.query_groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _split_qkv(whole: Tensor, model: ModelConfig) -> list[Tensor]:
    by_group = whole.unflatten(0, (model.query_groups, -1))
    queries = model.num_attention_heads // model.query_groups
    widths = [queries * model.head_width, model.head_width, model.head_width]
    return [part.flatten(0, 1) for part in by_group.split(widths, dim=1)]


QKV = Layout(_join_qkv, _split_qkv)
"""(q [H * N, ...], k and v [G * N, ...]) <-> rows by key/value group: its queries, its key, its value."""

GATE_AND_UP = Layout(
    lambda parts, _: torch.stack([part.t() for part in parts], dim=1),
    lambda whole, _: [part.t() for part in whole.unbind(1)],
)
"""(gate, up), each [F, D] <-> [D, 2, F]."""


@dataclass(frozen=True)
class WeightMapping:
    """A parameter and the Hugging Face tensors that it is composed of. {layer} in a name is the number of the layer,
    where the block of a layer for multi-token prediction is one of the layers after the last; if
    the tensors have {expert}, the parameter has one slice per expert along its first dimension. Mappings of parameters
    that a model does not have are not used."""

    parameter: str
    tensors: tuple[str, ...]
    layout: Layout = AS_IS


@dataclass(frozen=True)
class Field:
    """A key of config.json and the setting with the same meaning."""

    key: str
    setting: str
    """Dotted key below `model.`."""
    default: Any = None
    """The default of Transformers if config.json does not have the key."""
    aliases: tuple[str, ...] = ()
    """Other names of the key, written by some versions of Transformers."""
    minimum: int = 1
    """The smallest value if the default is an integer or null."""
    nullable: bool = False
    """Whether null is allowed although the default is a number; from_hf handles it."""
    fractional: bool = False
    """If the default is null: whether other values are any number instead of a positive integer."""
    values: Mapping[Any, Any] | None = None
    """Value in config.json -> value of the setting; others are refused. None: the same values."""
    from_hf: Callable[[Any, HfConfig], Any] = lambda value, _: value
    """(value in config.json, config.json with defaults) -> value of the setting. Raises ValueError, whose message is
    what would be supported."""
    to_hf: Callable[[Any, ModelConfig], Any] = lambda value, _: value
    """(value of the setting, model) -> value in config.json."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of Transformers."""

    name: str
    architecture: str
    """The class that config.json names in `architectures`."""
    fields: tuple[Field, ...]
    weights: tuple[WeightMapping, ...]
    rope_theta: float
    """Base of the rotary embedding's frequencies if config.json does not have it."""
    disabled: Mapping[str, object]
    """Unsupported features: key -> the value that disables it. Any other value is refused."""
    settings: Mapping[str, tuple[object, ...]]
    """Settings, below `model.`, that all models of the family have in common: the value that an import sets, then
    further equivalent values. Every setting that is neither here nor in `fields` must have its default."""
    training: Mapping[str, object]
    """Further settings of an import, which affect only training and evaluation."""
    neutral_keys: tuple[str, ...] = ()
    """Further keys of config.json that do not change what the model computes."""
    rope_parameters: HfConfig | None = None
    """Of the rotary embedding if config.json has neither these nor rope_scaling. None: no scaling."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """What rope_type may be."""
    partial_rotary: float | None = None
    """partial_rotary_factor if config.json does not have it. None: the family rotates whole heads."""
    ignored_tensors: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that are not weights."""
    aliases: tuple[str, ...] = ()
    """Other model types with the same keys and tensors, which Transformers does not have."""
    mtp_tensor: str | None = None
    """A tensor that only a layer for multi-token prediction has; such layers are stored after the last layer. None: the
    family has none."""
    mtp_copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor of such a layer -> the parameter that it is a copy of."""
    refuse: Callable[[ModelConfig], str | None] = lambda model: None
    """Why a model does not belong to the family although each of its settings does. None: it does."""
