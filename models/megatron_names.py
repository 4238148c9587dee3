"""The names and layouts of GPTModel's parameters in a checkpoint of Megatron-Core, for those of models.decoder.

Legend: V vocabulary, D hidden, E experts, F hidden size of a feed-forward layer, G 2 for gated activations, else 1.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.extensions import input_projections
from conf.schema import ModelConfig
from models.megatron_checkpoint import MegatronCheckpoint

Shape = tuple[int, ...]
IGNORED = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "opt_param_scheduler")
"""Beginnings of the names of tensors that do not belong to the model."""
_TOP = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
    "head.bias": "output_layer.bias",
}
_PADDED = ("embedding.weight", "head.weight", "head.bias")
"""May have more rows than the vocabulary."""
_LAYER = {
    "attention_norm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "attention.qkv.weight": ("self_attention.linear_qkv.weight",),
    "attention.qkv.bias": ("self_attention.linear_qkv.bias",),
    "attention.out.weight": ("self_attention.linear_proj.weight",),
    "attention.out.bias": ("self_attention.linear_proj.bias",),
    "attention.q_layernorm.weight": ("self_attention.q_layernorm.weight",),
    "attention.k_layernorm.weight": ("self_attention.k_layernorm.weight",),
    "ffn_norm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "ffn.gate.weight": ("mlp.linear_fc1.weight",),
    "ffn.up.weight": ("mlp.linear_fc1.weight",),
    "ffn.gate.bias": ("mlp.linear_fc1.bias",),
    "ffn.up.bias": ("mlp.linear_fc1.bias",),
    "ffn.down.weight": ("mlp.linear_fc2.weight",),
    "ffn.down.bias": ("mlp.linear_fc2.bias",),
    "ffn.router.weight": ("mlp.router.weight",),
    "ffn.router.logit_bias": ("mlp.router.bias",),
    "ffn.router.bias": ("mlp.router.expert_bias",),
    "ffn.experts.w_in": ("mlp.experts.experts.linear_fc1.weight",),
    "ffn.experts.w_out": ("mlp.experts.experts.linear_fc2.weight",),
    "ffn.experts.b_in": ("mlp.experts.experts.linear_fc1.bias",),
    "ffn.experts.b_out": ("mlp.experts.experts.linear_fc2.bias",),
    "ffn.shared.ffn.gate.weight": ("mlp.shared_experts.linear_fc1.weight",),
    "ffn.shared.ffn.up.weight": ("mlp.shared_experts.linear_fc1.weight",),
    "ffn.shared.ffn.down.weight": ("mlp.shared_experts.linear_fc2.weight",),
    "ffn.shared.gate": ("mlp.shared_experts.gate_weight",),
}
"""Parameter of a layer -> its possible names after `decoder.layers.` or `decoder.layers.N.`: a norm is part of the next
linear layer in some specifications of the layer."""


@dataclass(frozen=True)
class Stored:
    """Where a parameter is stored, and how it is made of it."""

    tensor: str
    layer: tuple[int, ...]
    """Its index in a tensor of all layers; empty if the layer has a tensor of its own."""
    shape: Shape
    """Of what is stored for this parameter, without the dimension of layers."""
    experts: bool
    convert: Callable[[Tensor], Tensor]
    """Of the stored tensor, or of that of one expert."""

    def parts(self, checkpoint: MegatronCheckpoint) -> Iterator[Tensor]:
        """The parameter in pieces along its first dimension."""
        if not self.experts:
            yield self.convert(checkpoint.read(self.tensor, self.layer))
            return
        for expert in range(self.shape[0]):
            yield self.convert(checkpoint.read(self.tensor, (*self.layer, expert)))[None]


def find(
    model: ModelConfig, shapes: Mapping[str, Shape], stored: Mapping[str, tuple[torch.dtype, Shape]]
) -> tuple[dict[str, Stored], list[str]]:
    """(where each parameter is stored, the names of tensors that do not belong to the model).

    Args:
        shapes: logical name -> shape of every parameter. Routers' balancing biases may be missing from the checkpoint.
        stored: name -> type and shape of the checkpoint's tensors.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message lists them.
    """
    gates = input_projections(model.activation)
    found, missing, misshapen = dict[str, Stored](), [], []
    for name, shape in shapes.items():
        places = [*_places(name, shape, gates)]
        place = next((place for place in places if place.tensor in stored), None)
        if place is None:
            if not name.endswith((".last_load", ".router.bias")):
                missing.append(places[-1].tensor)
            continue
        wanted = (model.num_layers, *place.shape) if place.layer else place.shape
        is_shape = stored[place.tensor][1]
        if name in _PADDED and is_shape[:1] >= wanted[:1]:
            is_shape = (wanted[0], *is_shape[1:])
        if is_shape != wanted:
            misshapen.append(f"{place.tensor} {[*stored[place.tensor][1]]} instead of {[*wanted]}")
        found[name] = place
    ignored = [name for name in stored if name.startswith(IGNORED)]
    unexpected = sorted(stored.keys() - {place.tensor for place in found.values()} - set(ignored))
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lists = {what: list(dict.fromkeys(names)) for what, names in lists.items()}
    if any(lists.values()):
        problems = (f"{len(names)} {what}: {', '.join(names[:20])}" for what, names in lists.items() if names)
        raise ValueError(f"the tensors do not match the settings of model=: {'; '.join(problems)}")
    return found, ignored


def _places(name: str, shape: Shape, gates: int) -> Iterator[Stored]:
    """Where a parameter may be stored."""
    if name in _TOP:
        yield Stored(_TOP[name], (), shape, False, lambda whole: whole[: shape[0]])
        return
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    number, rest = (int(match[1]), match[2]) if match else (0, "")
    theirs, experts, convert = _layout(rest, shape, gates)
    for suffix in _LAYER.get(rest, ()):
        yield Stored(f"decoder.layers.{number}.{suffix}", (), theirs, experts, convert)
        yield Stored(f"decoder.layers.{suffix}", (number,), theirs, experts, convert)
    if rest not in _LAYER:
        yield Stored("no known name", (), shape, False, lambda whole: whole)


def _layout(rest: str, shape: Shape, gates: int) -> tuple[Shape, bool, Callable[[Tensor], Tensor]]:
    """(shape of the stored tensor, whether it has a dimension of experts, the conversion)."""
    if rest == "ffn.experts.w_in":
        experts, hidden, _, width = shape
        return (experts, gates * width, hidden), True, lambda t: t.unflatten(0, (gates, width)).permute(2, 0, 1)
    if rest == "ffn.experts.w_out":
        return (shape[0], shape[2], shape[1]), True, lambda t: t.t()
    if rest == "ffn.experts.b_in":
        return (shape[0], shape[1] * shape[2]), True, lambda t: t.unflatten(0, shape[1:])
    if gates == 2 and re.search(r"ffn\.(gate|up)\.", rest):  # one above the other
        half = 0 if ".gate." in rest else 1
        return (2 * shape[0], *shape[1:]), False, lambda t: t.chunk(2)[half]
    return shape, rest.startswith("ffn.experts."), lambda t: t
