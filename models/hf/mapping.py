"""Maps the parameters of a model to Hugging Face tensors, and checks that each is used exactly once."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
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
    """A parameter of the model and the tensors that it is composed of."""

    name: str
    shape: Shape
    pieces: tuple[tuple[str, ...], ...]
    """The names of the tensors of each slice along the first dimension; if there is one piece, of the whole
    parameter."""
    layout: Layout
    per_expert: bool

    def piece_shape(self) -> Shape:
        return self.shape[1:] if self.per_expert else self.shape

    def tensors(self, model: ModelConfig) -> dict[str, Shape]:
        """name -> shape of its Hugging Face tensors."""
        shapes = [
            tuple(part.shape) for part in self.layout.split(torch.empty(self.piece_shape(), device="meta"), model)
        ]
        return {name: shape for piece in self.pieces for name, shape in zip(piece, shapes, strict=True)}

    def join(self, parts: list[Tensor], model: ModelConfig) -> Tensor:
        """A piece of the parameter from its tensors."""
        whole = self.layout.join(parts, model)
        return whole[None] if self.per_expert else whole


def parameters_of(family: Family, model: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[list[Parameter], list[str]]:
    """(the parameters that the family has tensors for, the names of the others).

    Args:
        shapes: logical name -> shape of every parameter of the model.
    """
    found, unknown = [], []
    for name, shape in shapes.items():
        layer = re.match(r"layers\.(\d+)\.", name)
        number = layer[1] if layer else ""
        rules = [rule for rule in family.weights if rule.parameter.replace("{layer}", number) == name]
        if not rules:
            unknown.append(name)
            continue
        (rule,) = rules
        names = [tensor.replace("{layer}", number) for tensor in rule.tensors]
        per_expert = "{expert}" in rule.tensors[0]
        experts = range(shape[0]) if per_expert else range(1)
        pieces = tuple(tuple(tensor.replace("{expert}", str(e)) for tensor in names) for e in experts)
        found.append(Parameter(name, shape, pieces, rule.layout, per_expert))
    return found, unknown


def check_tensors(
    family: Family, model: ModelConfig, parameters: list[Parameter], entries: Mapping[str, tuple[str, Shape]]
) -> list[str]:
    """Checks that every tensor of the source is used exactly once and every parameter is set exactly once.

    Args:
        entries: name -> (type, shape) of every tensor of the source.

    Returns:
        The names of unused tensors: ignored ones, and a second copy of the embedding.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message lists them.
    """
    wanted = [item for parameter in parameters for item in parameter.tensors(model).items()]
    shapes = dict(wanted)
    assert len(shapes) == len(wanted), "two parameters take the same tensor"
    copies = [HEAD] if model.tie_embeddings and HEAD in entries else []
    ignored = [name for name in entries if any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored_tensors)]
    ignored += mtp_tensors(family, model, entries)
    lists = {
        "missing": [name for name in shapes if name not in entries],
        "unexpected": sorted(entries.keys() - shapes.keys() - {*ignored, *copies}),
        "of another shape": [
            f"{name} {list(entries[name][1])} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in entries and entries[name][1] != shape
        ],
    }
    if any(lists.values()):
        problems = (f"{len(names)} {what}: {_some(names)}" for what, names in lists.items() if names)
        raise ValueError(f"the tensors do not match this {family.name} model: {'; '.join(problems)}")
    return [*copies, *ignored]


def mtp_tensors(family: Family, model: ModelConfig, names: Iterable[str]) -> list[str]:
    """The tensors of layers for multi-token prediction, stored after the model's own layers."""
    layers: dict[int, list[str]] = {}
    for name in names:
        if (match := re.match(r"model\.layers\.(\d+)\.", name)) and int(match[1]) >= model.num_layers:
            layers.setdefault(int(match[1]), []).append(name)
    marked = [
        tensors
        for layer, tensors in layers.items()
        if family.mtp_tensor and f"model.layers.{layer}.{family.mtp_tensor}" in tensors
    ]
    return [name for tensors in marked for name in tensors]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
