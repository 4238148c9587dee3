"""Runs that train low-rank adapters (conf/lora_schema.py): the weights that they adapt, and what they cost."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.lora_layers import adapted_kinds
from conf.schema import Config, ModelConfig
from parallel.layout import Layout
from training.flops import Cost, attention_span, experts_per_token, model_cost

if TYPE_CHECKING:
    from models.hf.convert import CheckpointWeights
    from training.memory_estimate import Stage

_FORWARD_AND_INPUTS = 4 / 6
"""Of the FLOPs of a trained weight, those of a frozen one: it has no gradient."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Base:
    """The checkpoint whose weights adapters were trained for."""

    path: str
    """Of a step's directory, absolute."""
    digest: str
    """The hash of its manifest, which has the hashes of all its files."""

    def __str__(self) -> str:
        return f"{self.path} (hash {self.digest[:12]})"

    def as_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def _manifest(directory: Path) -> dict[str, Any]:
    """Raises ValueError: it cannot be read."""
    try:
        found = json.loads((directory / _MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is not a complete checkpoint: {_MANIFEST}: {error}") from None
    return found if isinstance(found, dict) else {}


def base_of(directory: Path) -> Base | None:
    """The base of a checkpoint of adapters; None: it holds a whole model."""
    found = _manifest(directory).get("base")
    return Base(**found) if found else None


def as_base(directory: Path) -> Base:
    """A checkpoint as the base of adapters.

    Raises:
        ValueError: it holds adapters itself, or cannot be read.
    """
    manifest = _manifest(directory)
    if manifest.get("base"):
        raise ValueError(
            f"{directory} holds adapters, which have no adapters of their own: export them with merge=true "
            f"(python -m launch.export_hf checkpoint={directory} merge=true output=DIR) and import the result"
        )
    return Base(str(directory.absolute()), str(manifest.get("digest")))


def found_base(directory: Path, base: Base) -> Path:
    """The directory of the base of a checkpoint.

    Raises:
        ValueError: it is gone, or has been replaced.
    """
    if not (Path(base.path) / _MANIFEST).is_file():
        raise ValueError(f"{directory} holds adapters of {base}, which is not there")
    if (here := as_base(Path(base.path))) != base:
        raise ValueError(f"{directory} holds adapters of {base}, but that is now another checkpoint, {here}")
    return Path(base.path)


def open_weights(directory: Path, run: Config) -> "CheckpointWeights":
    """The weights of a checkpoint; adapters are merged into those of their base.

    Raises:
        ValueError: the base is gone, or has been replaced.
    """
    from models.hf.convert import CheckpointWeights
    from models.lora_weights import MergedWeights
    from parallel.checkpoint_manifest import read_manifest

    if base := base_of(directory):
        return MergedWeights(directory, found_base(directory, base), run)
    return CheckpointWeights(directory, read_manifest(directory)["tensors"])


def check_base(load: str, source: Path, newest: Path) -> None:
    """Raises ValueError unless checkpoint.load is what the adapters of a run were trained for.

    Args:
        load: the setting.
        source: the step's directory that it means.
        newest: a checkpoint of the run.
    """
    here, trained = as_base(source), base_of(newest)
    if trained is not None and trained.digest != here.digest:
        raise ValueError(
            f"checkpoint.load={load} is {here}, but the adapters of {newest} were trained for {trained}: set "
            f"checkpoint.load={trained.path}, or choose another run.dir"
        )


def adapter_parameters(config: Config, layout: Layout, stage: "Stage | None" = None) -> tuple[float, float]:
    """Numbers of the adapters' parameters of a rank of a pipeline stage: (outside of experts, of experts).

    Args:
        stage: None: of all stages together.
    """
    lora, model = config.lora, config.model
    here = _blocks_of(model, layout, stage)
    spread = experts = 0.0
    for kind in adapted_kinds(model, lora):
        layer, count = kind.layer, len(kind.blocks & here)
        inner, outer = layer.inner, layer.outer
        if layer.experts:
            experts += count * layer.experts / (layout.ep * layout.etp) * (lora.rank or 0) * (inner + outer)
            continue
        inner /= layout.tp if layer.sharded == "inner" else 1
        outer /= layout.tp if layer.sharded == "outer" else 1
        spread += count * ((lora.rank or 0) * (inner + outer) + lora.dora * outer)
    return spread, experts


def _blocks_of(model: ModelConfig, layout: Layout, stage: "Stage | None") -> set[int]:
    if stage is None:
        return set(range(model.num_layers))
    chunks = range(stage.index, layout.pp * layout.vpp, layout.pp)
    return {layer for chunk in chunks for layer in layout.chunk_layers(chunk, model.num_layers)}


def experts_are_adapted(config: Config) -> bool:
    """Whether routed experts have adapters."""
    return any(kind.layer.experts for kind in adapted_kinds(config.model, config.lora))


def share_adapted(config: Config, name: str, *, sparse: bool) -> Mapping[str, float]:
    """Of each projection of the modules `name` (attention, ffn, ffn.experts or ffn.shared.ffn) of sparse or of dense
    layers, the share that has adapters."""
    found = defaultdict[str, float](float)
    for kind in adapted_kinds(config.model, config.lora):
        if kind.module == name and kind.sparse == sparse:
            found[kind.layer.name.rpartition(".")[2]] = kind.share
    return found


def run_cost(config: Config) -> Cost:
    """Parameters and FLOPs of a run, as training.flops.model_cost. With adapters a frozen weight costs the products of
    the forward pass and of the gradient of its input, and an adapter 6 FLOPs per parameter."""
    cost = model_cost(config.model, config.train.sequence_length)
    if config.lora.rank is None:
        return cost
    spread, experts = adapter_parameters(config, Layout(1))
    moe = config.model.moe
    active = spread + experts * (experts_per_token(config.model) / moe.num_experts if moe.num_experts else 0)
    widths = config.model.query_width + config.model.output_width
    scores = 6.0 * widths * attention_span(config.model, config.train.sequence_length)
    flops = _FORWARD_AND_INPUTS * (cost.flops_per_token - scores) + scores + 6.0 * active
    return Cost(cost.total + round(spread + experts), cost.active + round(active), flops)
