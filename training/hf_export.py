"""Exports a checkpoint as a Hugging Face model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf import rules
from conf.commands import ExportConfig
from conf.schema import Config, LoraConfig
from corpus.paths import check_exists
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import companions
from models.hf.configuration import CONFIG, config_of, family_for, read_json
from models.hf.family import Family
from models.hf.sequence_classification import ONE_LABEL, sequence_classification
from parallel.env import started_ranks
from training import hf_verify
from training.adapters import base_of, found_base, open_weights
from training.hf_adapter import write_adapter
from training.hf_runs import SINGLE_PROCESS, STEP, atomic_directory, keep_settings, origin_of
from training.load_checkpoint import configured_here
from training.output_redirect import redirect_output
from training.run_dir import TOKENIZER, load_config

if TYPE_CHECKING:  # they import PyTorch; settings are validated before that
    from models.hf.convert import CheckpointWeights
    from models.hf.mapping import Parameter

DTYPES = ("stored", "fp32", "bf16")
GENERATION = "generation_config.json"
_TRANSIENT, _BIAS = ".last_load", ".router.bias"


def export_model(config: ExportConfig) -> int:
    """Converts and verifies a checkpoint. Returns the exit code: 1 if the models differ.

    Raises:
        ValueError: no whole checkpoint, a model or a router's state that no family has room for, or `output` is taken.
            Nothing is written then.
    """
    world, ranks = started_ranks()
    if world.size > 1:
        raise ValueError(SINGLE_PROCESS)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    if not config.shard_gib > 0:
        raise ValueError(f"shard_gib={config.shard_gib} must be > 0")
    if config.verify:
        hf_verify.check_available(config.precision, adapter=config.adapter)
    from parallel.checkpoint_manifest import resolve

    check_exists("checkpoint", config.checkpoint)
    directory = resolve(config.checkpoint)
    run_dir = directory.parent.parent
    run = load_config(run_dir)
    _check_adapters(config, run)
    rules.check_layout(configured_here(run, config), ranks)
    origin = origin_of(run_dir.absolute())
    base = read_json(origin / CONFIG) if origin and (origin / CONFIG).is_file() else {}
    family = family_for(replace(run.model, reward_head=False), config.family or base.get("model_type"))
    if run.model.reward_head and config.verify and config.parallel.tp > 1:
        raise ValueError(f"parallel.tp={config.parallel.tp}: the rewards of a reward model are verified with 1")
    output = Path(config.output).expanduser()
    tokenizer = Tokenizer.load(str(path), run.data.eod_token) if (path := run_dir / TOKENIZER).is_file() else None
    try:
        with atomic_directory(output) as aside:
            whole = aside / "base" if config.adapter else aside
            if config.adapter:
                write_adapter(aside, directory, family, run)
            if config.verify or not config.adapter:
                whole.mkdir(exist_ok=True)
                dtype = write_model(
                    config, _weights_to_write(config, directory, run), whole, family, run, run_dir, ranks
                )
            if config.verify:
                _verify(config, directory, run, aside, tokenizer)
            else:
                print("verify=false: the converted weights were not verified")
            if config.adapter:
                dtype = f"adapters of rank {run.lora.rank}"
                shutil.rmtree(whole, ignore_errors=True)
    except hf_verify.Different as found:
        print(f"{found}: {output} is not written")
        return 1
    print(f"exported {directory} as {family.name}, {dtype} -> {output}")
    return 0


def write_model(
    config: ExportConfig,
    weights: "CheckpointWeights",
    directory: Path,
    family: Family,
    run: Config,
    run_dir: Path,
    threads: int,
) -> str:
    """Writes weights, configuration and tokenizer of a run. Returns the widest of the weights' dtypes."""
    origin = origin_of(run_dir.absolute())
    base = read_json(origin / CONFIG) if origin and (origin / CONFIG).is_file() else {}
    base = base if base.get("model_type") in (family.name, *family.aliases) else {}
    tokenizer = Tokenizer.load(str(path), run.data.eod_token) if (path := run_dir / TOKENIZER).is_file() else None
    theirs = config_of(family, run.model, base)
    if run.model.reward_head:
        family = sequence_classification(family)
        theirs |= {"architectures": [family.architecture]} | ONE_LABEL
    dtype = _write_weights(config, weights, directory, family, run, threads)
    _write_files(directory, run_dir, origin, tokenizer, theirs | {"dtype": dtype}, run)
    return dtype


def _check_adapters(config: ExportConfig, run: Config) -> None:
    """Raises ValueError unless adapter and merge say, for a run with adapters alone, what to do with them."""
    has = run.lora.rank is not None
    if config.adapter and config.merge:
        raise ValueError("adapter=true writes the adapters alone and merge=true the whole model: choose one")
    if has and not (config.adapter or config.merge):
        raise ValueError(
            f"checkpoint={config.checkpoint} holds adapters: adapter=true writes them for peft, and merge=true a whole "
            "model with the adapters merged"
        )
    if not has and (config.adapter or config.merge):
        raise ValueError(
            f"{'adapter' if config.adapter else 'merge'}=true needs a run with adapters, but lora.rank of "
            f"checkpoint={config.checkpoint} is null; nearest: leave it out"
        )
    if config.adapter and config.dtype != "stored":
        raise ValueError(
            f"dtype={config.dtype}: adapters are written as they are stored, in fp32; nearest: dtype=stored"
        )


def _weights_to_write(config: ExportConfig, directory: Path, run: Config) -> "CheckpointWeights":
    """Of the whole model: merged, or for adapters those of their base."""
    from parallel.checkpoint_manifest import read_manifest

    weights = open_weights(directory, run)
    if not config.adapter:
        return weights
    from models.hf.convert import CheckpointWeights

    recorded = base_of(directory)
    assert recorded is not None
    base = found_base(directory, recorded)
    return CheckpointWeights(base, read_manifest(base)["tensors"])


def _verify(config: ExportConfig, directory: Path, run: Config, aside: Path, tokenizer: Tokenizer | None) -> None:
    """Raises Different if the model of Transformers in `aside` does not compute what the checkpoint does."""
    if config.adapter:
        hf_verify.check_same(config, aside / "base", directory, tokenizer, aside, adapter=aside)
        return
    rounded = config.dtype == "bf16"
    if not (rounded and config.merge):
        hf_verify.check_same(config, aside, directory, tokenizer, aside, rounded=rounded)
        return
    # Rounded were the merged weights: ours are merged, and then rounded, too.
    merged = aside / "merged"
    write_merged(directory, run, merged)
    hf_verify.check_same(config, aside, merged / STEP, tokenizer, aside, rounded=True)
    shutil.rmtree(merged)


def write_merged(directory: Path, run: Config, output: Path) -> None:
    """Writes a checkpoint of adapters as a run directory with the merged weights."""
    from models.hf.convert import write_step

    weights = open_weights(directory, run)
    kinds = {name: (weights.dtype(name), shape) for name, shape in weights.shapes().items()}
    output.mkdir()
    keep_settings(output, replace(run, lora=LoraConfig()))
    write_step(output / STEP, kinds, lambda name: iter([weights.read(name)]))


def _write_weights(
    config: ExportConfig, weights: "CheckpointWeights", aside: Path, family: Family, run: Config, threads: int
) -> str:
    """Writes the weights. Returns the widest of their dtypes, as in config.json."""
    import torch

    from models.hf.convert import write_shards
    from training.model_shapes import logical_shapes

    redirection = redirect_output(0)
    try:
        shapes = logical_shapes(run.model)
    finally:
        redirection.undo()
    parameters = _parameters(family, run, shapes, weights)
    dtype = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    limit = int(config.shard_gib * 2**30)
    written = write_shards(aside, weights, parameters, run.model, dtype=dtype, shard_bytes=limit, threads=threads)
    types = set(written.values())
    widest: torch.dtype = types.pop()
    for kind in types:
        widest = torch.promote_types(widest, kind)
    return str(widest).removeprefix("torch.")


def _parameters(
    family: Family, run: Config, shapes: dict[str, tuple[int, ...]], weights: "CheckpointWeights"
) -> "list[Parameter]":
    """The parameters of the checkpoint, without transient state.

    Raises:
        ValueError: a parameter has no counterpart in the family, or is missing.
    """
    from models.hf.mapping import mtp_copies, parameters_of

    stored = {name: shape for name, shape in weights.shapes().items() if not name.endswith(_TRANSIENT)}
    parameters, unknown = parameters_of(family, run.model, stored)
    for name in unknown:
        if name.endswith(_BIAS) and not weights.read(name).any():
            continue
        what = " is a balancing bias that is not zero, and" if name.endswith(_BIAS) else ":"
        raise ValueError(f"{name}{what} a {family.name} of Transformers has no place for it")
    lost = sorted(n for n in shapes.keys() - stored.keys() if not n.endswith((_BIAS, _TRANSIENT)))
    if lost or (lost := sorted(n for n in stored.keys() & shapes.keys() if stored[n] != shapes[n])):
        raise ValueError(f"{weights.directory} is of another model than its run: {', '.join(lost[:5])}")
    return [*parameters, *mtp_copies(family, run.model, stored)]


def _write_files(
    aside: Path, run_dir: Path, origin: Path | None, tokenizer: Tokenizer | None, theirs: dict[str, Any], run: Config
) -> None:
    """config.json, generation_config.json and the tokenizer."""
    from models.hf.files import companion_files

    replaced = bool(origin and tokenizer is not None and not _same_tokenizer(origin.parent, run_dir))
    for path in companion_files(origin) if origin else ():
        if path.name in (CONFIG, GENERATION) or not replaced:
            shutil.copyfile(path, aside / path.name)
    theirs.pop("torch_dtype", None)
    if tokenizer is not None:
        shutil.copyfile(run_dir / TOKENIZER, aside / TOKENIZER)
        for path in companions(run_dir / TOKENIZER):
            shutil.copyfile(path, aside / path.name)
        if not (aside / "tokenizer_config.json").exists():
            named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": run.data.eod_token}
            _write_json(aside / "tokenizer_config.json", named)
    if replaced:
        assert tokenizer is not None
        theirs |= {"eos_token_id": tokenizer.eod_id}
        generation = read_json(aside / GENERATION) if (aside / GENERATION).is_file() else {}
        _write_json(aside / GENERATION, generation | {"eos_token_id": tokenizer.eod_id})
    if not origin:
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eod_id if tokenizer else None}
        theirs |= ends | {"max_position_embeddings": run.train.sequence_length}
        _write_json(aside / GENERATION, ends)
    _write_json(aside / CONFIG, theirs)


def _same_tokenizer(run_dir: Path, other: Path) -> bool:
    """Whether two runs have the same tokenizer.json."""
    path = run_dir / TOKENIZER
    return path.is_file() and path.read_bytes() == (other / TOKENIZER).read_bytes()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
