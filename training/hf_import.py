"""Imports a Hugging Face model as a run directory."""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf import rules
from conf.commands import ImportConfig
from conf.override_text import command, override
from conf.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from corpus.paths import check_exists
from corpus.tokenizer import Tokenizer
from models.hf.configuration import CONFIG as THEIR_CONFIG
from models.hf.configuration import model_of, read_json
from models.hf.family import Family
from models.hf.quantization import block_of
from parallel.env import started_ranks
from training import hf_verify
from training.hf_runs import BESIDE, SINGLE_PROCESS, STEP, atomic_directory, keep_settings, model_name
from training.output_redirect import redirect_output
from training.run_dir import TOKENIZER

if TYPE_CHECKING:  # imports PyTorch; settings are validated before that
    from models.hf.files import Source


def import_model(config: ImportConfig) -> int:
    """Converts and verifies a model. Returns the exit code: 1 if the models differ.

    Raises:
        ValueError: something of the source is not understood, missing or too much, or `output` is taken. Nothing is
            written then.
    """
    source, output = Path(config.source).expanduser(), Path(config.output).expanduser()
    world, ranks = started_ranks()
    if world.size > 1:
        raise ValueError(SINGLE_PROCESS)
    if config.verify:
        hf_verify.check_available(config.precision, adapter=config.adapter is not None)
    if config.adapter is not None:
        from training.hf_adapter_import import import_adapter

        return import_adapter(config, ranks)
    check_exists("source", config.source)
    if not (source / THEIR_CONFIG).is_file():
        raise ValueError(f"source={config.source} is no directory with a {THEIR_CONFIG}, as `hf download` makes it")
    theirs = read_json(source / THEIR_CONFIG)
    family, model = model_of(theirs, source / THEIR_CONFIG)
    tokenizer = _tokenizer(source, theirs, config.eod_token)
    run = _run_config(config, theirs, dataclasses.replace(model, name=model_name(output, "imported")), tokenizer)
    rules.check(run, 1)
    rules.check_layout(dataclasses.replace(run, parallel=config.parallel), ranks)
    try:
        with atomic_directory(output) as aside:
            with _source(source, family, block_of(theirs)) as opened:
                run = _with_stored_layers(run, family, opened)
                summary = _convert(opened, aside, family, run.model, ranks)
            _keep_files(source, aside, run)
            if config.verify:
                hf_verify.check_same(config, source, aside / STEP, tokenizer, aside)
            else:
                print("verify=false: the converted weights were not verified")
    except hf_verify.Different as found:
        print(f"{found}: {output} is not written")
        return 1
    print(f"imported {family.name} from {source}: {summary} -> {output}")
    words = [override("checkpoint.load", str(output))]
    if tokenizer is None:
        words.append("data.tokenizer=PATH")  # without one, the ids of new text would have another meaning
    if run.data.eod_token != DataConfig().eod_token:
        words.append(override("data.eod_token", run.data.eod_token))
    print(
        "train on: " + command(["bash", "launch/train.sh", f"--config-dir={output}", f"model={run.model.name}"], words)
    )
    return 0


def _tokenizer(source: Path, theirs: dict[str, Any], eod_token: str | None) -> Tokenizer | None:
    """The source's tokenizer. Its end-of-document token is `eod_token`, else the source's end-of-sequence token.

    Raises:
        ValueError: the tokenizer has no such token, or the source does not define one.
    """
    path = source / TOKENIZER
    if not path.is_file():
        return None
    if eod_token is None:
        ids = theirs.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        inner = Tokenizer.load(str(path), None)
        eod_token = next((token for i in ids if isinstance(i, int) and (token := inner.token(i)) is not None), None)
        if eod_token is None:
            raise ValueError(
                f"{path} has no token {ids[0]} (eos_token_id): say with eod_token=TOKEN what ends a document"
            )
    return Tokenizer.load(str(path), eod_token)


def _run_config(
    config: ImportConfig, theirs: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer | None
) -> Config:
    length = theirs.get("max_position_embeddings")
    length = min(config.sequence_length, length) if isinstance(length, int) and length > 0 else config.sequence_length
    eod = tokenizer.token(tokenizer.eod_id) if tokenizer and tokenizer.eod_id is not None else None
    return Config(
        model=model,
        data=DataConfig(eod_token=eod) if eod else DataConfig(),
        train=TrainConfig(sequence_length=length),
        run=RunConfig(name=model.name),
    )


def _source(directory: Path, family: Family, block: tuple[int, int] | None) -> "Source":
    from models.hf.files import Source

    return Source(directory, family, block)


def _with_stored_layers(run: Config, family: Family, source: "Source") -> Config:
    """The settings without layers for multi-token prediction if the source has none of their tensors: Transformers
    keeps the number in config.json when it leaves out the tensors.

    Raises:
        ValueError: it has another number of them than config.json says.
    """
    from models.hf.mapping import stored_mtp_layers

    wanted, found = run.model.mtp_num_layers, stored_mtp_layers(family, run.model, source.entries)
    if found == wanted:
        return run
    key = next(field.key for field in family.fields if field.setting == "mtp_num_layers")
    if found:
        raise ValueError(
            f"{THEIR_CONFIG} has {key}={wanted}, but there are tensors of {found} layers for multi-token prediction: "
            f"set it to {found}"
        )
    print(f"{key}={wanted}, but there are no tensors of such layers: imported without")
    return dataclasses.replace(run, model=dataclasses.replace(run.model, mtp_num_layers=0))


def _convert(source: "Source", aside: Path, family: Family, model: ModelConfig, threads: int) -> str:
    """Writes the checkpoint. Returns a description of what was converted."""
    from models.hf.convert import check_copies, check_tied_head, write_checkpoint
    from models.hf.mapping import HEAD, check_tensors, mtp_copies, parameters_of
    from training.model_shapes import logical_shapes

    redirection = redirect_output(0)
    try:
        shapes = logical_shapes(model)
    finally:
        redirection.undo()
    parameters, unknown = parameters_of(family, model, shapes)
    assert not unknown, unknown
    idle = check_tensors(family, model, parameters, source.entries)
    if HEAD in idle:
        check_tied_head(source, next(p.pieces[0][0] for p in parameters if p.name == "embedding.weight"))
    check_copies(source, parameters, mtp_copies(family, model, shapes))
    write_checkpoint(aside / STEP, source, parameters, model, threads)
    words = source.described(idle)
    if model.mtp_num_layers:
        words += f", {model.mtp_num_layers} of the layers for multi-token prediction (not verified by Transformers)"
    return words + (f" ({len(idle)} without weights left: {', '.join(idle[:3])})" if idle else "")


def _keep_files(source: Path, aside: Path, run: Config) -> None:
    from models.hf.files import companion_files

    (aside / BESIDE).mkdir()
    for path in companion_files(source):
        shutil.copyfile(path, aside / BESIDE / path.name)
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, aside / TOKENIZER)
    keep_settings(aside, run)
