"""Imports adapters of peft as a run directory, beside the run of their base.

Legend: E experts, D hidden, F expert hidden, K inner and N outer dimension of a layer, r rank.
"""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.commands import ExportConfig, ImportConfig
from conf.lora_layers import AdaptedLayer, adaptable_layers, adapted_layers
from conf.schema import CheckpointConfig, Config, LoraConfig, RunConfig
from corpus.tokenizer import Tokenizer
from models.hf.configuration import CONFIG as MODEL_CONFIG
from models.hf.configuration import family_for, read_json
from models.hf.family import Family
from training import hf_export, hf_verify
from training.adapters import as_base, open_weights
from training.hf_adapter import CONFIG, PREFIX, WEIGHTS, experts_of, modules_of
from training.hf_runs import STEP, atomic_directory, keep_settings, origin_of
from training.run_dir import TOKENIZER, load_config

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "trainable_token_indices"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora", "velora_config", "kasa_config"), (None,)),
}
"""Key of adapter_config.json -> the values that mean plain LoRA."""


@dataclass
class Update:
    """scale * B A of a layer; of an expert's layer for each expert."""

    a: "Tensor"
    """[r, K], or [E, r, K]."""
    b: "Tensor"
    """[N, r], or [E, N, r]."""
    scale: float


def import_adapter(config: ImportConfig, ranks: int) -> int:
    """Writes a run of adapters. Returns the exit code: 1 if the models differ.

    Raises:
        ValueError: something of the adapter is not understood, or `output` is taken. Nothing is written then.
    """
    from models.hf.convert import write_step
    from parallel.checkpoint_manifest import resolve

    assert config.adapter is not None
    base, adapter, output = resolve(config.source), Path(config.adapter).expanduser(), Path(config.output).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise ValueError(
                f"adapter={config.adapter} is no directory with {name}, as save_pretrained of peft makes it"
            )
    run_dir = base.parent.parent
    recorded, run = as_base(base), load_config(run_dir)
    origin = origin_of(run_dir.absolute())
    kind = read_json(origin / MODEL_CONFIG).get("model_type") if origin and (origin / MODEL_CONFIG).is_file() else None
    family = family_for(run.model, kind)
    updates = read_updates(adapter, family, run)
    lora, tensors = as_settings(updates)
    run = dataclasses.replace(
        run, lora=lora, checkpoint=CheckpointConfig(load=str(base)), run=RunConfig(name=run.model.name)
    )
    assert {layer.name for layer in adapted_layers(run.model, lora)} == updates.keys()
    tokenizer = Tokenizer.load(str(path), run.data.eod_token) if (path := run_dir / TOKENIZER).is_file() else None
    try:
        with atomic_directory(output) as aside:
            kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            write_step(aside / STEP, kinds, lambda name: iter([tensors[name]]), base=recorded.as_json())
            keep_settings(aside, run)
            if tokenizer is not None:
                shutil.copyfile(run_dir / TOKENIZER, aside / TOKENIZER)
            if config.verify:
                _verify(config, adapter, aside, family, run, tokenizer, ranks)
            else:
                print("verify=false: the converted weights were not verified")
    except hf_verify.Different as found:
        print(f"{found}: {output} is not written")
        return 1
    print(f"imported adapters of rank {lora.rank} for {len(updates)} layers of {base} -> {output}")
    return 0


def _verify(
    config: ImportConfig,
    adapter: Path,
    aside: Path,
    family: Family,
    run: Config,
    tokenizer: Tokenizer | None,
    ranks: int,
) -> None:
    """Raises Different if peft on the exported base does not compute what the run does."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(ExportConfig) if hasattr(config, f.name)}
    how = ExportConfig(**{**shared, "checkpoint": str(aside), "adapter": True})
    weights = open_weights(Path(run.checkpoint.load or ""), run)
    whole = aside / "base"
    whole.mkdir()
    hf_export.write_model(how, weights, whole, family, run, aside, ranks)
    hf_verify.check_same(how, whole, aside / STEP, tokenizer, aside, adapter=adapter)
    shutil.rmtree(whole)


def read_updates(adapter: Path, family: Family, run: Config) -> dict[str, Update]:
    """The updates in the directory of an adapter, by the name of our layer.

    Raises:
        ValueError: it is of another kind than LoRA, or a tensor belongs to no layer that can have adapters.
    """
    from safetensors.torch import load_file

    theirs = read_json(adapter / CONFIG)
    if wrong := [key for key, plain in _PLAIN.items() if theirs.get(key, plain[0]) not in plain]:
        said = ", ".join(f"{key}={theirs[key]}" for key in wrong)
        raise ValueError(f"{adapter / CONFIG}: {said} is not implemented; plain LoRA is")
    tensors = load_file(adapter / WEIGHTS)
    found: dict[str, Update] = {}
    for layer in adaptable_layers(run.model):
        one = dataclasses.replace(run, lora=LoraConfig(rank=1, target=[layer.name]))
        try:
            modules, experts = modules_of(family, one), experts_of(family, one)
        except ValueError:  # the family has no place for adapters of this layer
            continue
        for module in modules:
            if (pair := _take(tensors, module)) is not None:
                found[layer.name] = Update(*pair, _scale(theirs, module, pair[0].shape[0]))
        for module in experts:
            if layer.name.endswith(".down"):  # once, for all projections
                prefix = layer.name.removesuffix("down")
                found |= {prefix + part: update for part, update in _experts(theirs, tensors, module, layer)}
    if tensors:
        names = ", ".join(sorted(tensors)[:4])
        raise ValueError(f"{adapter / WEIGHTS}: no layer of this {family.name} can have the adapters {names}")
    if not found:
        raise ValueError(f"{adapter / WEIGHTS} holds no adapters")
    return found


def _take(tensors: "dict[str, Tensor]", module: str) -> "tuple[Tensor, Tensor] | None":
    """A and B of a module, removed from the tensors; None: it has none."""
    names = [f"{PREFIX}{module}.lora_{factor}.weight" for factor in "AB"]
    if any(name not in tensors for name in names):
        return None
    return tensors.pop(names[0]).float(), tensors.pop(names[1]).float()


def _scale(theirs: dict[str, Any], name: str, rank: int) -> float:
    alpha = theirs.get("lora_alpha", 8)
    for pattern, value in (theirs.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return alpha / (rank**0.5 if theirs.get("use_rslora") else rank)


def _experts(
    theirs: dict[str, Any], tensors: "dict[str, Tensor]", module: str, down: AdaptedLayer
) -> Iterator[tuple[str, Update]]:
    """The updates of gate, up and down; the inverse of training.hf_adapter's form. gate_up_proj and down_proj, if both
    have adapters, are nested in this order."""
    targets = theirs.get("target_parameters") or []
    has = {
        name: any(f"{module}.{name}".endswith(target) for target in targets) for name in ("gate_up_proj", "down_proj")
    }
    inner = _take(tensors, f"{module}.base_layer") if all(has.values()) else None
    outer = _take(tensors, module)
    into = inner if all(has.values()) else outer if has["gate_up_proj"] else None
    if into is not None:
        a_ErD, b_ENr = _by_expert(into, down.experts)
        scale = _scale(theirs, f"{module}.gate_up_proj", a_ErD.shape[1])
        for part, b_EFr in zip(("gate", "up"), b_ENr.chunk(2, dim=1), strict=True):
            # Of a block-diagonal B, the columns that are not zero.
            used_r = b_EFr.abs().amax(dim=(0, 1)) > 0
            used_r = used_r if used_r.any() else ~used_r
            yield part, Update(a_ErD[:, used_r], b_EFr[:, :, used_r], scale)
    if has["down_proj"] and outer is not None:
        a_ErF, b_EDr = _by_expert(outer, down.experts)
        yield "down", Update(a_ErF, b_EDr, _scale(theirs, f"{module}.down_proj", a_ErF.shape[1]))


def _by_expert(pair: "tuple[Tensor, Tensor]", experts: int) -> "tuple[Tensor, Tensor]":
    a, b = pair
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def as_settings(updates: dict[str, Update]) -> "tuple[LoraConfig, dict[str, Tensor]]":
    """(the settings, the parameters by logical name). Here all adapters have one rank and one scale: lower ranks are
    filled up with zeros, and B is multiplied by the ratio of the scales."""
    import torch.nn.functional as F

    rank = max(update.a.shape[-2] for update in updates.values())
    scale = max(update.scale for update in updates.values())
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        missing = rank - update.a.shape[-2]
        a = F.pad(update.a, (0, 0, 0, missing))
        b = F.pad(update.b * (update.scale / scale), (0, missing))
        if a.dim() == 3:  # the experts' products have rows on the left
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        module, _, part = name.rpartition(".")
        tensors |= {f"{module}.lora.{part}.a": a.contiguous(), f"{module}.lora.{part}.b": b.contiguous()}
    return LoraConfig(rank=rank, alpha=scale * rank, target=sorted(updates)), tensors
