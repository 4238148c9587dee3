"""Exports adapters in the format of peft: adapter_config.json and adapter_model.safetensors.

Legend: E experts, D hidden, F expert hidden, K inner and N outer dimension of a layer, r rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.lora_layers import AdaptedLayer, adapted_layers, scale_of
from conf.schema import Config
from models.hf.family import AS_IS, GATE_AND_UP, QKV, TRANSPOSED, Family, WeightMapping

if TYPE_CHECKING:  # it imports PyTorch's distributed package; settings are validated before that
    from torch import Tensor

    from models.hf.convert import CheckpointWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""In a sparse model peft takes modules of these names for experts, also where they are dense layers or shared experts
(peft.utils.transformers_weight_conversion). As parameters they are left alone."""
_FUSED_BLOCK = "mlp"
"""What Transformers calls the sparse block, whatever the stored tensors call it."""


def modules_of(family: Family, run: Config) -> dict[str, AdaptedLayer]:
    """Module in Transformers -> the layer, of all adapted layers but routed experts.

    Raises:
        ValueError: the family has no module for a layer.
    """
    found = {}
    for layer in adapted_layers(run.model, run.lora):
        if layer.experts:
            continue
        module, _, part = layer.name.rpartition(".")
        rule, index = _rule(family, f"{layer.name}.weight", layer.layer), 0
        expected = AS_IS
        if rule is None and part in ("q", "k", "v"):
            rule, index, expected = _rule(family, f"{module}.qkv.weight", layer.layer), "qkv".index(part), QKV
        if rule is None or rule.layout is not expected:
            raise ValueError(_refusal(family, layer, "computes it in another module than a linear layer of its own"))
        name = rule.tensors[index].replace("{layer}", str(layer.layer)).removesuffix(".weight")
        found[name] = layer
    return found


def experts_of(family: Family, run: Config) -> dict[str, dict[str, AdaptedLayer]]:
    """Module in Transformers that holds the experts of a layer -> its adapted projections, by gate, up and down.

    Raises:
        ValueError: the family keeps experts in another form.
    """
    found: dict[str, dict[str, AdaptedLayer]] = {}
    for layer in adapted_layers(run.model, run.lora):
        if not layer.experts:
            continue
        module, _, part = layer.name.rpartition(".")
        rule = _rule(family, f"{module}.{'w_out' if part == 'down' else 'w_in'}", layer.layer)
        expected = TRANSPOSED if part == "down" else GATE_AND_UP
        if rule is None or rule.layout is not expected or ".experts.{expert}." not in rule.tensors[0]:
            raise ValueError(
                _refusal(family, layer, "keeps experts in tensors that this export has no adapters of peft for")
            )
        found.setdefault(f"model.layers.{layer.layer}.{_FUSED_BLOCK}.experts", {})[part] = layer
    return found


def _rule(family: Family, parameter: str, layer: int) -> WeightMapping | None:
    rules = (rule for rule in family.weights if rule.parameter.replace("{layer}", str(layer)) == parameter)
    return next(rules, None)


def _refusal(family: Family, layer: AdaptedLayer, why: str) -> str:
    return (
        f"adapter=true: {layer.name} has adapters, but {family.name} of Transformers {why}; merge=true exports the "
        "whole model with the adapters merged"
    )


def write_adapter(directory: Path, checkpoint: Path, family: Family, run: Config) -> None:
    """Writes both files. A scale by rsLoRA is written as the alpha that gives the same scale.

    Args:
        checkpoint: the step's directory with the adapters.

    Raises:
        ValueError: peft has no form for an adapter.
        OSError: the files cannot be written.
    """
    from safetensors.torch import save_file

    from models.hf.convert import CheckpointWeights
    from models.lora_weights import MergedWeights, read_adapter
    from parallel.checkpoint_manifest import read_manifest
    from training.adapters import open_weights

    lora = run.lora
    assert lora.rank is not None
    modules, experts = modules_of(family, run), experts_of(family, run)
    weights = CheckpointWeights(checkpoint, read_manifest(checkpoint)["tensors"])
    merged = open_weights(checkpoint, run) if lora.dora else None
    tensors: dict[str, Tensor] = {}
    for module, layer in modules.items():
        a_rK, b_Nr = read_adapter(weights, layer)
        tensors |= _named(module, a_rK, b_Nr)
        if isinstance(merged, MergedWeights):
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = merged.length(layer).contiguous()
    ranks: dict[str, int] = {}
    for module, parts in experts.items():
        tensors |= _experts(weights, module, parts, ranks)
    alpha = scale_of(lora) * lora.rank
    by_weight = [name for name in modules if run.model.moe.num_experts and name.endswith(_NAMES_OF_EXPERTS)]
    if by_weight and lora.dora:
        why = "is a layer that peft takes for experts, of which it has no DoRA"
        raise ValueError(_refusal(family, modules[by_weight[0]], why))
    parameters = [*(f"{name}.weight" for name in by_weight), *ranks]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # peft has none for parameters, and refuses it
        "use_rslora": False,
        "use_dora": lora.dora,
        "bias": "none",
        "target_modules": [name for name in modules if name not in by_weight],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora.rank},
        "alpha_pattern": {n: alpha * r / lora.rank for n, r in ranks.items() if r != lora.rank},
    }
    if parameters:
        config["target_parameters"] = parameters
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _named(module: str, a_rK: "Tensor", b_Nr: "Tensor") -> dict[str, "Tensor"]:
    prefix = f"{PREFIX}{module}."
    return {f"{prefix}lora_A.weight": a_rK.contiguous(), f"{prefix}lora_B.weight": b_Nr.contiguous()}


def _experts(
    weights: "CheckpointWeights", module: str, parts: Mapping[str, AdaptedLayer], ranks: dict[str, int]
) -> dict[str, "Tensor"]:
    """The adapters of gate_up_proj [E, 2 F, D] and down_proj [E, D, F], as peft's ParamWrapper has them: A of all
    experts [E * r, K], B [N, r * E] with the expert as its fastest index. Gate and up have adapters of their own, which
    together are one of twice the rank whose B is block-diagonal.

    Args:
        ranks: is given the rank of each parameter.
    """
    import torch

    from models.lora_weights import read_adapter

    tensors: dict[str, Tensor] = {}
    into = [part for part in ("gate", "up") if part in parts]
    wrapped = module
    if into:
        count, width = parts[into[0]].experts, parts[into[0]].outer
        pieces = []
        for expert in range(count):
            factors = {part: read_adapter(weights, parts[part], expert) for part in into}
            blocks = []
            for part, (_, b_Fr) in factors.items():
                block = b_Fr.new_zeros(2 * width, b_Fr.shape[1])
                block[:width] += b_Fr if part == "gate" else 0
                block[width:] += b_Fr if part == "up" else 0
                blocks.append(block)
            pieces.append((torch.cat([a_rD for a_rD, _ in factors.values()]), torch.cat(blocks, 1)))
        # Of several parameters of a module, peft wraps the first one first: it is the base layer of the second.
        wrapped = f"{module}.base_layer" if "down" in parts else module
        tensors |= _named(wrapped, *_stacked(pieces))
        ranks[f"{module}.gate_up_proj"] = pieces[0][0].shape[0]
    if "down" in parts:
        pieces = [read_adapter(weights, parts["down"], expert) for expert in range(parts["down"].experts)]
        tensors |= _named(module, *_stacked(pieces))
        ranks[f"{module}.down_proj"] = pieces[0][0].shape[0]
    return tensors


def _stacked(pieces: "list[tuple[Tensor, Tensor]]") -> "tuple[Tensor, Tensor]":
    import torch

    a_ErK = torch.stack([a_rK for a_rK, _ in pieces])
    b_NrE = torch.stack([b_Nr for _, b_Nr in pieces], dim=-1)
    return a_ErK.flatten(0, 1), b_NrE.flatten(1)
