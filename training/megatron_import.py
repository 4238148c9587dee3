"""Imports the weights of a checkpoint of Megatron-Core as a run directory."""

import collections
import dataclasses
import shutil
from pathlib import Path

from conf import rules
from conf.commands import ImportMegatronConfig
from conf.override_text import command, override
from conf.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import COMPANION_DIR, companions, tokenizer_json
from parallel.env import started_ranks
from training.hf_runs import STEP, atomic_directory, keep_settings, model_name
from training.output_redirect import redirect_output
from training.run_dir import TOKENIZER


def import_model(config: ImportMegatronConfig) -> int:
    """Converts a model. Returns the exit code.

    Raises:
        ValueError: the source cannot be read, its tensors are not those of the model, or `output` is taken. Nothing is
            written then.
    """
    output = Path(config.output).expanduser()
    world, threads = started_ranks()
    if world.size > 1:
        raise ValueError("start a single process, with NPROC=N to convert N files at a time")
    model = dataclasses.replace(config.model, name=model_name(output, "imported"))
    tokenizer = None if config.tokenizer is None else Path(tokenizer_json(config.tokenizer, "tokenizer="))
    if tokenizer is not None:
        Tokenizer.load(str(tokenizer), config.eod_token)
    run = Config(
        model=model,
        data=DataConfig(eod_token=config.eod_token),
        train=TrainConfig(sequence_length=config.sequence_length),
        run=RunConfig(name=model.name),
    )
    rules.check(run, 1)
    if model.mtp_num_layers:
        raise ValueError(
            f"model.mtp_num_layers={model.mtp_num_layers}: layers for multi-token prediction are not imported from "
            "Megatron-Core; nearest: 0, for a checkpoint without them"
        )
    with atomic_directory(output) as aside:
        summary = _convert(Path(config.source).expanduser(), aside / STEP, model, threads)
        keep_settings(aside, run)
        if tokenizer is not None:
            _keep_tokenizer(tokenizer, aside)
    print(f"imported {summary} -> {output}")
    print("not compared with Megatron-Core: the checkpoint does not say how the weights are used. Check the loss:")
    print(command([".venv/bin/python", "-m", "launch.evaluate", f"checkpoint={output}"], ["data.files=[TEXT]"]))
    words = [override("checkpoint.load", str(output)), *(["data.tokenizer=PATH"] if tokenizer is None else [])]
    print("train on: " + command(["bash", "launch/train.sh", f"--config-dir={output}", f"model={model.name}"], words))
    return 0


def _convert(source: Path, directory: Path, model: ModelConfig, threads: int) -> str:
    """Writes the checkpoint. Returns a description of what was converted."""
    from models.hf.convert import write_step
    from models.megatron_checkpoint import MegatronCheckpoint
    from models.megatron_names import find
    from training.model_shapes import logical_shapes

    checkpoint = MegatronCheckpoint(source)
    redirection = redirect_output(0)
    try:
        shapes = logical_shapes(model)
    finally:
        redirection.undo()
    found, ignored = find(model, shapes, checkpoint.tensors)
    kinds = {name: (checkpoint.tensors[place.tensor][0], shapes[name]) for name, place in found.items()}
    write_step(directory, kinds, lambda name: found[name].parts(checkpoint), threads)
    used = len({place.tensor for place in found.values()})
    kept_out = collections.Counter(_kind(name) for name in [*ignored, *checkpoint.objects])
    words = ", ".join(f"{count} of {kind}" for kind, count in sorted(kept_out.items()))
    return f"{used} tensors from {checkpoint.directory}" + (f" (not used: {words})" if words else "")


def _kind(name: str) -> str:
    """What a name that is not used belongs to."""
    if "_extra_state" in name:
        return "_extra_state"
    return "the optimizer" if "optimizer." in name else name.split("/")[0].split(".")[0]


def _keep_tokenizer(tokenizer: Path, aside: Path) -> None:
    shutil.copyfile(tokenizer, aside / TOKENIZER)
    for path in companions(tokenizer):
        (aside / COMPANION_DIR).mkdir(exist_ok=True)
        shutil.copyfile(path, aside / COMPANION_DIR / path.name)
