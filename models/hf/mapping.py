"""Maps the parameters of a model to Hugging Face tensors, and checks that each is used exactly once."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import ModelConfig
from models.hf.family import AS_IS, Family, Layout

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
        layer = re.match(r"layers\.(\d+)\.", known := _as_layer(name, model))
        number = layer[1] if layer else ""
        rules = [rule for rule in family.weights if rule.parameter.replace("{layer}", number) == known]
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


def _as_layer(name: str, model: ModelConfig) -> str:
    """The name of a parameter of a layer for multi-token prediction as if it were one of the layers after the last."""
    further = re.fullmatch(r"mtp\.(\d+)\.(?:block\.)?(.*)", name)
    return f"layers.{model.mtp_layers[int(further[1])]}.{further[2]}" if further else name


def mtp_copies(family: Family, model: ModelConfig, shapes: Mapping[str, Shape]) -> list[Parameter]:
    """The copies of parameters that layers for multi-token prediction have in Hugging Face's files.

    Args:
        shapes: as for `parameters_of`.
    """
    found = []
    for layer in model.mtp_layers:
        for tensor, name in family.mtp_copies.items():
            name = name if name in shapes else "embedding.weight"  # of a tied head
            found.append(Parameter(name, shapes[name], ((f"model.layers.{layer}.{tensor}",),), AS_IS, False))
    return found


def check_tensors(
    family: Family, model: ModelConfig, parameters: list[Parameter], entries: Mapping[str, tuple[str, Shape]]
) -> list[str]:
    """Checks that every tensor of the source is used exactly once and every parameter is set exactly once.

    Args:
        entries: name -> (type, shape) of every tensor of the source.

    Returns:
        The names of unused tensors: ignored ones, and second copies of the embedding and of the head.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message lists them.
    """
    wanted = [item for parameter in parameters for item in parameter.tensors(model).items()]
    shapes = dict(wanted)
    assert len(shapes) == len(wanted), "two parameters take the same tensor"
    copies = [HEAD] if model.tie_embeddings and HEAD in entries else []
    further = mtp_copies(family, model, {parameter.name: parameter.shape for parameter in parameters})
    copies += [name for copy in further for name in copy.tensors(model) if name in entries]
    ignored = [name for name in entries if any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored_tensors)]
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


def stored_mtp_layers(family: Family, model: ModelConfig, names: Iterable[str]) -> int:
    """The number of layers for multi-token prediction that have tensors, stored after the model's own layers."""
    if family.mtp_tensor is None:
        return 0
    found = {int(m[1]) for n in names if (m := re.fullmatch(rf"model\.layers\.(\d+)\.{family.mtp_tensor}", n))}
    return sum(layer >= model.num_layers for layer in found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
