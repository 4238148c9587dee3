"""Finds the tensors of single experts in tensors that hold all experts of a layer: save_pretrained of Transformers 5
writes those with save_original_format=False, under the names of its modules."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from models.hf.family import GATE_AND_UP, TRANSPOSED, Family

Entry = tuple[str, tuple[int, ...]]
"""(safetensors dtype, shape)."""
_MODULE = "mlp"
"""What Transformers calls the sparse block, whatever the stored tensors of single experts call it."""


@dataclass(frozen=True)
class Part:
    """A part of a stored tensor."""

    tensor: str
    expert: int | None = None
    """Index along the first dimension. None: the whole tensor."""
    half: int | None = None
    """0: the first half of the expert's rows (gate), 1: the second (up). None: all rows."""


def split_fused(family: Family, entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, Part]]:
    """(the entries with one tensor per expert, where their tensors are in the stored ones).

    Args:
        entries: name -> type and shape of every stored tensor.

    Raises:
        ValueError: experts are stored both together and one by one.
    """
    found, parts = dict(entries), dict[str, Part]()

    def add(name: str, shape: tuple[int, ...], part: Part) -> None:
        if name in found:
            raise ValueError(f"the tensor {name} is stored, and also a part of {part.tensor}")
        found[name], parts[name] = (entries[part.tensor][0], shape), part

    for rule in family.weights:
        if rule.layout not in (GATE_AND_UP, TRANSPOSED) or ".experts.{expert}." not in rule.tensors[0]:
            continue
        block = rule.tensors[0].split(".experts.")[0].split(".")[-1]
        halves = (0, 1) if rule.layout is GATE_AND_UP else (None,)
        fused = f"model.layers.{{layer}}.{_MODULE}.experts.{'gate_up_proj' if len(halves) == 2 else 'down_proj'}"
        for name in sorted(entries):
            match = re.fullmatch(re.escape(fused).replace(r"\{layer\}", r"(\d+)"), name)
            if match is None or len(shape := entries[name][1]) != 3 or shape[1] % len(halves):
                continue
            del found[name]
            for expert in range(shape[0]):
                for half, tensor in zip(halves, rule.tensors, strict=True):
                    own = tensor.replace("{layer}", match[1]).replace("{expert}", str(expert))
                    add(own, (shape[1] // len(halves), shape[2]), Part(name, expert, half))
            if block != _MODULE:
                prefix = f"model.layers.{match[1]}."
                for other in [n for n in found if n.startswith(f"{prefix}{_MODULE}.") and ".experts." not in n]:
                    shape = found.pop(other)[1]
                    add(other.replace(f"{prefix}{_MODULE}.", f"{prefix}{block}."), shape, Part(other))
    return found, parts
