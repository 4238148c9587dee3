"""Training on preferences: its data, and the log-probabilities of the reference.

The reference is the model with the weights that the run starts from. Its log-probabilities are computed once, before
the first step, and kept in the run directory. An adapter that starts at zero leaves the base model's unchanged, so that
they are those of the frozen base as well.

Legend: B sequences, S sequence (this rank's shard), P prompts, K responses.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.blend_plan import blend_plan
from conf.preference_schema import sequences_per_prompt
from conf.schema import Config
from corpus.open_data import held_out_samples, training_stream
from corpus.preference_stream import PreferenceSet, PreferenceStream, held_out_set, training_set
from corpus.prepare import Prepared, Source
from corpus.stream import HeldOut, Stream
from models.objectives import needs_reference, objective_of, response_logps
from parallel.batch_context import EVALUATE, BatchContext
from parallel.engine import Batch
from training.builder import BuiltModel
from training.evaluate import EvalResult, evaluate, global_batches
from training.run_files import write_atomically

REFERENCE_FILE = "reference.npz"


def open_data(
    config: Config, prepared: Prepared, note: Callable[[str], None], *, ahead: bool = False
) -> tuple[Stream, HeldOut]:
    """The training stream and the held-out windows of a run. `ahead`: as of TrainStream."""
    train, data = config.train, config.data
    length = train.sequence_length
    if data.kind == "preference":
        responses = sequences_per_prompt(train.objective, config.preference)
        prompts = training_set(prepared, sequence_length=length, responses=responses)
        held_out = held_out_set(prepared, sequence_length=length, responses=responses)
        return PreferenceStream(prompts, seed=train.seed), held_out
    how = {"sequence_length": length, "seed": train.seed, "plan": blend_plan(config)}
    stream = training_stream(prepared, data, **how, note=note, ahead=ahead)
    return stream, held_out_samples(prepared, data, sequence_length=length)


def set_reference(
    built: BuiltModel, stream: Stream, held_out: Any, run_dir: Path, *, loaded: Path | None, step: int
) -> str | None:
    """Gives both sets the log-probabilities of the reference, if the objective has one. Every rank calls this together.

    Args:
        loaded: the checkpoint whose weights the model has; None: initial weights.
        step: 0: the model has the weights of the reference. Otherwise they were computed by an earlier attempt.

    Returns:
        What was done, for the user; None for another objective.

    Raises:
        ValueError: those of the earlier attempt are missing, or of other data.
    """
    if not needs_reference(built.config.train.objective):
        return None
    assert isinstance(stream, PreferenceStream)
    splits: dict[str, PreferenceSet] = {"train": stream.prompts, "valid": held_out}
    data = _data_key(stream.prompts.source, held_out.source)
    weights = f"initial weights of seed {built.config.train.seed}"
    if loaded is not None:
        weights = hashlib.sha256((loaded / "manifest.json").read_bytes()).hexdigest()
    key = {"data": data, "weights": weights, "precision": built.precision}
    kept = _agree_on_kept(built, run_dir / REFERENCE_FILE, key, step)
    if kept is None:
        kept = {name: reference_logps(built, prompts) for name, prompts in splits.items()}
        if built.runtime.world.rank == 0:
            file = io.BytesIO()
            np.savez(file, key=np.array(json.dumps(key)), **kept)
            write_atomically(run_dir / REFERENCE_FILE, file.getvalue())
        what = "computed with the weights that the run starts from"
        what += " (random ones: there is no checkpoint.load)" if loaded is None else ""
    else:
        what = f"read from {run_dir / REFERENCE_FILE}"
    for name, prompts in splits.items():
        prompts.reference_PK = kept[name]
    moe = built.config.model.moe
    if moe.num_experts and (moe.capacity_factor or moe.eval_capacity_factor) is not None:
        what += ". With a capacity factor they depend on the micro-batch: model.moe.capacity_factor=null and "
        what += "model.moe.eval_capacity_factor=null keep the policy comparable with the reference"
    count = sum(prompts.num_prompts for prompts in splits.values())
    return f"log-probabilities of the reference for {count:,} pairs {what}"


def _agree_on_kept(built: BuiltModel, path: Path, key: dict[str, str], step: int) -> dict[str, np.ndarray] | None:
    """What an earlier attempt has computed, as rank 0 reads it; None: it is to be computed."""
    answer: list[Any] = [None]
    if built.runtime.world.rank == 0:
        answer[0] = _read_kept(path, key, step)
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def _read_kept(path: Path, key: dict[str, str], step: int) -> dict[str, np.ndarray] | str | None:
    """A string: why the run cannot continue."""
    try:
        with np.load(path, allow_pickle=False) as file:
            known, arrays = json.loads(str(file["key"])), {name: file[name] for name in ("train", "valid")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        known, arrays, problem = {}, {}, f"{path} cannot be read ({error})"
    else:
        if known == key if step == 0 else known.get("data") == key["data"]:
            return arrays
        problem = f"{path} has the log-probabilities of other preferences"
    if step == 0:
        return None
    return (
        f"{problem}, and the weights that this run started from are no longer those of step {step}. "
        "Restore the file and the data, or start another run with checkpoint.load"
    )


def evaluate_held_out(built: BuiltModel, prepared: Prepared, run_dir: Path, *, batches: int | None) -> EvalResult:
    """The objective on the held-out preferences of a trained run. Every rank calls this together.

    Raises:
        ValueError: the log-probabilities of the reference are missing, or of other preferences.
    """
    config = built.config
    _, held_out = open_data(config, prepared, print)
    assert isinstance(held_out, PreferenceSet)
    if needs_reference(config.train.objective):
        data = _data_key(*prepared.train, *prepared.valid)
        kept = _agree_on_kept(built, run_dir / REFERENCE_FILE, {"data": data}, 1)
        assert kept is not None
        held_out.reference_PK = kept["valid"]
    built.engine.objective = objective_of(config.train.objective, config.preference)
    return evaluate(built, held_out, None, batches=batches)


def _data_key(train: Source, valid: Source) -> str:
    return hashlib.sha256(json.dumps([train.sha256, valid.sha256]).encode()).hexdigest()


def reference_logps(built: BuiltModel, prompts: PreferenceSet) -> np.ndarray:
    """fp64 [P, K]: log-probability of each response under the current weights, without dropout and jitter. Every rank
    calls this together and gets the same."""
    cp = built.runtime.groups.cp
    values = value_of_each(built, prompts, lambda losses_BS, batch: response_logps(losses_BS, batch, cp))
    return values.view(-1, prompts.responses).numpy()


def value_of_each(built: BuiltModel, sequences: HeldOut, value: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """fp64 [sequences], on the CPU. Every rank calls this together and gets the same.

    Args:
        value: the model's output on the last stage and a micro-batch -> a value of each sequence [B], the same on every
            rank of context parallelism.
    """
    engine, groups = built.engine, built.runtime.groups
    micro, dp = built.config.train.micro_batch_size, groups.dp.size()
    for chunk in engine.chunks:
        chunk.eval()

    def step(output_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        value_B = value(output_BS, batch)
        return value_B.sum(), value_B

    values = torch.zeros(len(sequences), dtype=torch.float64, device=built.runtime.device)
    counts_here = groups.tp.rank() == groups.cp.rank() == 0
    with torch.no_grad():
        for first, batches in global_batches(built, sequences, None):
            for j, part in enumerate(engine.run_forward(batches, step, BatchContext(EVALUATE))):
                start = first + (j * dp + groups.dp.rank()) * micro
                if counts_here and start < len(values):
                    values[start : start + micro] = part[: len(values) - start]
    dist.all_reduce(values)
    return values.cpu()
