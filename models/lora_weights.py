"""The weights of a checkpoint of adapters, merged into those that they were trained for, and the lengths of DoRA.

Legend: E experts, K inner and N outer dimension of a layer, r rank.
"""

from pathlib import Path

import torch
from torch import Tensor

from conf.lora_layers import AdaptedLayer, adapted_layers, is_adapter, scale_of
from conf.schema import Config
from models.hf.convert import CheckpointWeights
from parallel.checkpoint_manifest import read_manifest

_QKV = ("q", "gate", "k", "v")


def read_adapter(weights: CheckpointWeights, layer: AdaptedLayer, expert: int | None = None) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of a layer, or of one expert, in fp32."""
    a, b = (weights.read(layer.parameter(factor), expert).float() for factor in ("a", "b"))
    return (a.t(), b.t()) if layer.experts else (a, b)  # the experts' products have rows on the left


class MergedWeights(CheckpointWeights):
    """W + scale * B A of every adapted layer, with DoRA each row scaled to its length, computed in fp32, and the other
    weights as they are stored."""

    def __init__(self, directory: Path, base: Path, run: Config):
        super().__init__(directory, read_manifest(directory)["tensors"])
        self.adapters = CheckpointWeights(directory, self.stored)
        self.base = CheckpointWeights(base, read_manifest(base)["tensors"])
        self.model, self.scale, self.dora = run.model, scale_of(run.lora), run.lora.dora
        self.updates: dict[str, dict[str, AdaptedLayer]] = {}
        """Name of a weight -> the layers whose products it holds, by their last names."""
        for layer in adapted_layers(run.model, run.lora):
            module, _, part = layer.name.rpartition(".")
            self.updates.setdefault(self._weight(layer, module, part), {})[part] = layer
        own = {name: shape for name, shape in super().shapes().items() if not is_adapter(name)}
        self.own = own
        """State that is set by a rule, which the run has changed."""

    def _weight(self, layer: AdaptedLayer, module: str, part: str) -> str:
        if layer.experts:
            return f"{module}.{'w_out' if part == 'down' else 'w_in'}"
        is_fused = module.endswith(".attention") and self.model.kv_lora_rank is None and part in _QKV
        return f"{module}.qkv.weight" if is_fused else f"{layer.name}.weight"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.base.shapes() | self.own

    def dtype(self, name: str) -> torch.dtype:
        if name in self.own:
            return super().dtype(name)
        return torch.float32 if name in self.updates else self.base.dtype(name)

    def read(self, name: str, first: int | None = None) -> Tensor:
        if name in self.own:
            return super().read(name, first)
        weight = self.base.read(name, first)
        if name not in self.updates:
            return weight
        if self.dora and first is not None:  # a row alone has no length that the others do not know
            return self.read(name)[first]
        merged = weight.float() + self._update(name, weight.shape, first)
        if not self.dora:
            return merged
        # A row of zeros has no length to divide by.
        length_N1 = merged.norm(dim=1, keepdim=True).clamp(min=torch.finfo(merged.dtype).tiny)
        return merged * (self._lengths(name)[:, None] / length_N1)

    def length(self, layer: AdaptedLayer) -> Tensor:
        """fp32 [N]: those that DoRA gives to the rows of a layer's weight."""
        module, _, part = layer.name.rpartition(".")
        name = self._weight(layer, module, part)
        lengths = self._lengths(name)
        return self._by_part(lengths)[part].flatten() if name.endswith(".qkv.weight") else lengths

    def _lengths(self, name: str) -> Tensor:
        """fp32 [N], of the rows of a weight."""
        lengths, layers = self.base.read(name).float().norm(dim=1), self.updates[name]
        parts = self._by_part(lengths) if name.endswith(".qkv.weight") else dict.fromkeys(layers, lengths)
        for part, layer in layers.items():
            parts[part] += self.adapters.read(layer.parameter("m")).float().view(parts[part].shape)
        return lengths

    def _by_part(self, rows_N: Tensor) -> dict[str, Tensor]:
        """Of attention's fused projection: views [groups, rows of a group] of queries, their gates, keys and values."""
        rows = rows_N.view(self.model.query_groups, -1)
        widths = [width // self.model.query_groups for width in self._widths.values()]
        return dict(zip(self._widths, rows.split(widths, 1), strict=True))

    @property
    def _widths(self) -> dict[str, int]:
        model = self.model
        return {"q": model.query_width, "gate": model.gate_width, "k": model.key_width, "v": model.key_width}

    def _update(self, name: str, shape: torch.Size, first: int | None) -> Tensor:
        layers = self.updates[name]
        if name.endswith(".qkv.weight"):
            update = self._fused(layers, shape)
            return update if first is None else update[first]
        if not next(iter(layers.values())).experts:
            (layer,) = layers.values()
            update = self._product(layer)
            return update if first is None else update[first]
        if first is not None:
            return self._expert(layers, shape, first)
        return torch.stack([self._expert(layers, shape[1:], expert) for expert in range(shape[0])])

    def _product(self, layer: AdaptedLayer, expert: int | None = None) -> Tensor:
        """[N, K]."""
        a_rK, b_Nr = read_adapter(self.adapters, layer, expert)
        return self.scale * (b_Nr @ a_rK)

    def _fused(self, layers: dict[str, AdaptedLayer], shape: torch.Size) -> Tensor:
        """Of attention's fused projection: rows by key/value group (models.attention)."""
        parts = []
        for part, width in self._widths.items():
            whole = self._product(layers[part]) if part in layers else torch.zeros(width, shape[-1])
            parts.append(whole.unflatten(0, (self.model.query_groups, -1)) if width else None)
        return torch.cat([part for part in parts if part is not None], dim=1).flatten(0, 1)

    def _expert(self, layers: dict[str, AdaptedLayer], shape: torch.Size, expert: int) -> Tensor:
        """Of one expert: w_in [D, G, F] or w_out [F, D]."""
        update = torch.zeros(shape)
        for part, layer in layers.items():
            product_KN = self._product(layer, expert).t()
            if part == "down":
                return product_KN
            update[:, -1 if part == "up" else 0] = product_KN
        return update
