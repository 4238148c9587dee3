"""What a family of models is made of: its config.json, its tensors, and where each of both is in our terms.

Legend: D hidden, F hidden width of a feed-forward layer, H query heads, G key/value groups, N width of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig


@dataclass(frozen=True)
class Layout:
    """How a parameter of ours, or the slice of it that belongs to one expert, is made of tensors of theirs. Both
    directions move elements and change none, and work on meta tensors too."""

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
class Weights:
    """A parameter of ours and the tensors of theirs that it is made of. {layer} in names counts layers; where theirs
    have {expert}, ours holds one slice per expert along its first axis. A rule whose parameter a model does not have is
    not used for that model."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = AS_IS


@dataclass(frozen=True)
class Field:
    """A key of config.json and the setting of ours that means the same."""

    theirs: str
    ours: str
    """Below `model.`, with dots."""
    default: Any = None
    """What Transformers takes where config.json does not say."""
    aliases: tuple[str, ...] = ()
    """Other names of the key, which some versions of Transformers write."""
    nullable: bool = False
    """Whether null may stand where the default is a number; the setting of ours then knows what it means."""
    fractional: bool = False
    """Whether it is any number where the default is null; else a whole one from 1."""
    values: Mapping[Any, Any] | None = None
    """Their value -> ours; others are refused. None: the same values."""
    to_ours: Callable[[Any, Mapping[str, Any]], Any] = lambda value, _: value
    """(their value, config.json with defaults) -> ours. A ValueError says what else than the value would do."""
    to_theirs: Callable[[Any, ModelConfig], Any] = lambda value, _: value


@dataclass(frozen=True)
class Family:
    """One `model_type` of Transformers."""

    name: str
    architecture: str
    """The class that config.json names."""
    fields: tuple[Field, ...]
    weights: tuple[Weights, ...]
    rope_theta: float
    """Base of the rotary frequencies where config.json does not say."""
    off: Mapping[str, Any]
    """Features that we do not have, each with the value that turns it off: refused by name with any other."""
    settings: Mapping[str, tuple[Any, ...]]
    """Settings of ours, below `model.`, that every model of the family has: what an import sets, then further values
    that mean the same. Every setting that is neither here nor in a field must have its default."""
    training: Mapping[str, Any]
    """What an import sets besides: of training and evaluation alone."""
    inert: tuple[str, ...] = ()
    """Further keys of config.json that change no number."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors (fnmatch) that carry no weights."""
    refuse: Callable[[ModelConfig], str | None] = lambda model: None
    """Why a model of ours is not of the family though every single setting is; None: it is."""
