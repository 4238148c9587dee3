"""Which tensors of theirs make which parameter of ours, and whether the account of both comes out even."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import ModelConfig
from models.hf.family import Family, Layout

Shape = tuple[int, ...]
HEAD = "lm_head.weight"
_SHOWN = 20


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model of ours, with what it is made of."""

    ours: str
    shape: Shape
    pieces: tuple[tuple[str, ...], ...]
    """The tensors of theirs that make each slice along the first axis; a single piece: the whole."""
    layout: Layout
    per_expert: bool

    def piece_shape(self) -> Shape:
        return self.shape[1:] if self.per_expert else self.shape

    def theirs(self, model: ModelConfig) -> dict[str, Shape]:
        """name -> shape of every tensor of theirs."""
        shapes = [
            tuple(part.shape) for part in self.layout.split(torch.empty(self.piece_shape(), device="meta"), model)
        ]
        return {name: shape for piece in self.pieces for name, shape in zip(piece, shapes, strict=True)}

    def join(self, parts: list[Tensor], model: ModelConfig) -> Tensor:
        """A piece, as it lies in the parameter."""
        whole = self.layout.join(parts, model)
        return whole[None] if self.per_expert else whole


def parameters_of(family: Family, model: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[list[Parameter], list[str]]:
    """(the parameters that the family has tensors for, the names of those that it has none for).

    Args:
        shapes: logical name -> shape of every parameter of the model.
    """
    found, unknown = [], []
    for name, shape in shapes.items():
        layer = re.match(r"layers\.(\d+)\.", name)
        number = layer[1] if layer else ""
        rules = [rule for rule in family.weights if rule.ours.replace("{layer}", number) == name]
        if not rules:
            unknown.append(name)
            continue
        (rule,) = rules
        names = [theirs.replace("{layer}", number) for theirs in rule.theirs]
        per_expert = "{expert}" in rule.theirs[0]
        experts = range(shape[0]) if per_expert else range(1)
        pieces = tuple(tuple(theirs.replace("{expert}", str(e)) for theirs in names) for e in experts)
        found.append(Parameter(name, shape, pieces, rule.layout, per_expert))
    return found, unknown


def account(
    family: Family, model: ModelConfig, parameters: list[Parameter], entries: Mapping[str, tuple[str, Shape]]
) -> list[str]:
    """Every tensor of the source must be used once, and every parameter filled once.

    Args:
        entries: name -> (type, shape) of every tensor of the source.

    Returns:
        The names that carry nothing: ignored, or a second copy of the embedding.

    Raises:
        ValueError: with the list of what is missing, too much or of another shape.
    """
    wanted = [item for parameter in parameters for item in parameter.theirs(model).items()]
    shapes = dict(wanted)
    assert len(shapes) == len(wanted), "two parameters take the same tensor"
    copies = [HEAD] if model.tie_embeddings and HEAD in entries else []
    idle = [name for name in entries if any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored)]
    lists = {
        "missing": [name for name in shapes if name not in entries],
        "not of this model": sorted(entries.keys() - shapes.keys() - {*idle, *copies}),
        "of another shape": [
            f"{name} {list(entries[name][1])} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in entries and entries[name][1] != shape
        ],
    }
    if any(lists.values()):
        told = (f"{len(names)} {what}: {_some(names)}" for what, names in lists.items() if names)
        raise ValueError(f"the tensors are not those of this {family.name}. {'; '.join(told)}")
    return [*copies, *idle]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
