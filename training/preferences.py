"""Training on preferences: its data, and the log-probabilities of the reference.

The reference is the model with the weights that the run starts from. Its log-probabilities are computed once, before
the first step, and kept in the run directory. An adapter that starts at zero leaves the base model's unchanged, so that
they are those of the frozen base as well.

Legend: B sequences, S sequence (this rank's shard), P prompts, K responses.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.preference_schema import sequences_per_prompt
from conf.schema import Config
from corpus.preference_stream import PreferenceSet, PreferenceStream, held_out_set, training_set
from corpus.prepare import Prepared
from corpus.stream import Stream, TrainStream, ValidWindows
from models.objectives import response_logps
from parallel.batch_context import EVALUATE, BatchContext
from parallel.engine import Batch
from training.builder import BuiltModel
from training.evaluate import global_batches
from training.run_files import write_atomically

REFERENCE_FILE = "reference.npz"


def open_data(config: Config, prepared: Prepared, note: Any) -> tuple[Stream, ValidWindows | PreferenceSet]:
    """The training stream and the held-out windows of a run."""
    train, data = config.train, config.data
    length = train.sequence_length
    if data.kind == "preference":
        responses = sequences_per_prompt(train.objective, config.preference)
        prompts = training_set(prepared, sequence_length=length, responses=responses)
        held_out = held_out_set(prepared, sequence_length=length, responses=responses)
        return PreferenceStream(prompts, seed=train.seed), held_out
    stream = TrainStream(
        prepared,
        sequence_length=length,
        seed=train.seed,
        cache_dir=data.cache_dir,
        document_mask=data.document_mask,
        note=note,
    )
    return stream, ValidWindows(prepared, sequence_length=length, document_mask=data.document_mask)


def set_reference(
    built: BuiltModel, stream: Stream, held_out: Any, run_dir: Path, *, loaded: Path | None, step: int
) -> str | None:
    """Gives both sets the log-probabilities of the reference, for train.objective=dpo. Every rank calls this together.

    Args:
        loaded: the checkpoint whose weights the model has; None: initial weights.
        step: 0: the model has the weights of the reference. Otherwise they were computed by an earlier attempt.

    Returns:
        What was done, for the user; None for another objective.

    Raises:
        ValueError: those of the earlier attempt are missing, or of other data.
    """
    if built.config.train.objective != "dpo":
        return None
    assert isinstance(stream, PreferenceStream)
    splits: dict[str, PreferenceSet] = {"train": stream.prompts, "valid": held_out}
    data = hashlib.sha256(json.dumps([prompts.source.sha256 for prompts in splits.values()]).encode()).hexdigest()
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


def reference_logps(built: BuiltModel, prompts: PreferenceSet) -> np.ndarray:
    """fp64 [P, K]: log-probability of each response under the current weights, without dropout and jitter. Every rank
    calls this together and gets the same."""
    engine, groups = built.engine, built.runtime.groups
    micro, dp = built.config.train.micro_batch_size, groups.dp.size()
    for chunk in engine.chunks:
        chunk.eval()

    def logps(losses_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logps_B = response_logps(losses_BS, batch, groups.cp)
        return logps_B.sum(), logps_B

    values = torch.zeros(len(prompts), dtype=torch.float64, device=built.runtime.device)
    counts_here = groups.tp.rank() == groups.cp.rank() == 0
    with torch.no_grad():
        for first, batches in global_batches(built, prompts, None):
            for j, part in enumerate(engine.run_forward(batches, logps, BatchContext(EVALUATE))):
                start = first + (j * dp + groups.dp.rank()) * micro
                if counts_here and start < len(values):
                    values[start : start + micro] = part[: len(values) - start]
    dist.all_reduce(values)
    return values.view(-1, prompts.responses).cpu().numpy()
