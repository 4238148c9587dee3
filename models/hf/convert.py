"""Converts Hugging Face tensors to a checkpoint and back. Each file is written by one thread, with one tensor, or one
expert's part of one, in memory at a time."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from conf.schema import ModelConfig
from models.hf.files import INDEX, SINGLE, Source
from models.hf.mapping import HEAD, Parameter
from parallel.checkpoint_format import DTYPES, StoredTensor, TensorFile, TensorShard, read_tensors, write_stream
from parallel.checkpoint_manifest import DATA_ORDER, UPDATES, run_to_completion, write_manifest

WEIGHTS = "weights."
"""Prefix of the names of parameters in a checkpoint."""
FILE_BYTES = 2**30
"""Maximum size of a checkpoint's file, unless it holds a single parameter."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def write_checkpoint(
    directory: Path, source: Source, parameters: list[Parameter], model: ModelConfig, threads: int
) -> None:
    """Writes the weights of `source` as a whole checkpoint of step 0 without optimizer states, each in the type that it
    has there.

    Args:
        directory: its final place, step_00000000; it does not exist yet.
        threads: the number of files that are written at the same time.

    Raises:
        OSError: the file cannot be written.
        ValueError: the source cannot be read, or a tied head differs from its embedding.
    """
    by_name = {p.name: p for p in parameters}
    kinds = {name: (_common_type(p, source), p.shape) for name, p in by_name.items()}

    def parts(name: str) -> Iterator[Tensor]:
        for piece in by_name[name].pieces:
            tensors = [source.read(tensor).to(kinds[name][0]) for tensor in piece]
            yield by_name[name].join(tensors, model)

    write_step(directory, kinds, parts, threads)


def write_step(
    directory: Path,
    weights: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Callable[[str], Iterator[Tensor]],
    threads: int = 1,
    base: dict[str, str] | None = None,
) -> None:
    """Writes a whole checkpoint of step 0 without optimizer states.

    Args:
        directory: its final place, step_00000000; it does not exist yet.
        weights: the type and shape of each parameter, by name.
        parts: name -> the parameter in pieces along its first axis; called by several threads.
        threads: the number of files that are written at the same time.
        base: of adapters, as parallel.checkpoint_manifest.write_manifest takes it.

    Raises:
        OSError: the file cannot be written.
    """
    kinds = {WEIGHTS + name: kind for name, kind in weights.items()} | {UPDATES: (torch.int64, (1,))}

    def pieces(name: str) -> Iterator[Tensor]:
        return iter([torch.zeros(1, dtype=torch.int64)]) if name == UPDATES else parts(name.removeprefix(WEIGHTS))

    directory.mkdir(parents=True)
    files = {f"weights_{i:05d}.safetensors": names for i, names in enumerate(_group(kinds, FILE_BYTES))}

    def write(file: str) -> list[Any]:
        return write_stream(directory / file, {name: kinds[name] for name in files[file]}, pieces)

    written = dict(zip(files, in_threads(threads, write, files), strict=True))
    stored = {}
    for file, names in files.items():
        for name in names:
            shape = kinds[name][1]
            stored[name] = StoredTensor(shape, [TensorShard(file, (0,) * len(shape), shape)])
    counters = {"step": 0, "samples": 0, "tokens": 0, "updates": 0, "world_size": 1, "data_order": DATA_ORDER}
    write_manifest(directory, counters, written, stored, base)


def in_threads(threads: int, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[work(item) for item in items], with several at the same time. Raises the first error, without starting the
    rest."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def check_copies(source: Source, parameters: list[Parameter], copies: list[Parameter]) -> None:
    """Raises ValueError if a tensor of a layer for multi-token prediction differs from the parameter that it is a copy
    of: it is read once, for all layers."""
    originals = {parameter.name: parameter.pieces[0][0] for parameter in parameters}
    for copy in copies:
        name, original = copy.pieces[0][0], originals[copy.name]
        if name in source.entries and not torch.equal(source.read(name).float(), source.read(original).float()):
            raise ValueError(f"{name} differs from {original}, which layers for multi-token prediction share")


def check_tied_head(source: Source, embedding: str) -> None:
    """Raises ValueError if the output layer of a model with tied embeddings differs from the embedding."""
    if not torch.equal(source.read(HEAD), source.read(embedding)):
        raise ValueError(f"tie_word_embeddings=true, but {HEAD} differs from {embedding}: set it to false")


def _common_type(parameter: Parameter, source: Source) -> torch.dtype:
    """The smallest type that represents all of the tensors exactly."""
    return reduce(torch.promote_types, {source.dtype(name) for piece in parameter.pieces for name in piece})


class CheckpointWeights:
    """The weights of a checkpoint, read one piece at a time."""

    def __init__(self, directory: Path, stored: Mapping[str, StoredTensor]):
        self.directory, self.stored = directory, stored
        self._types: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> its logical shape."""
        return {k.removeprefix(WEIGHTS): t.shape for k, t in self.stored.items() if k.startswith(WEIGHTS)}

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a parameter."""
        file = self.stored[WEIGHTS + name].shards[0].file
        if file not in self._types:
            with TensorFile(self.directory / file) as opened:
                self._types[file] = opened.entries()
        return DTYPES[self._types[file][WEIGHTS + name][0]]

    def read(self, name: str, first: int | None = None) -> Tensor:
        """A parameter, or one slice along its first dimension."""
        shape = self.stored[WEIGHTS + name].shape
        wanted = shape if first is None else (1, *shape[1:])
        target = torch.empty(wanted, dtype=self.dtype(name))
        offset = (first or 0, *(0,) * (len(shape) - 1))
        run_to_completion(read_tensors(self.directory, self.stored, {WEIGHTS + name: (target, offset)}))
        return target if first is None else target[0]


def write_shards(
    directory: Path,
    weights: CheckpointWeights,
    parameters: list[Parameter],
    model: ModelConfig,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    threads: int,
) -> dict[str, torch.dtype]:
    """Writes Hugging Face tensors as safetensors files, sharded with an index if they do not fit into one.

    Args:
        dtype: of all tensors; None: each as it is stored.
        threads: the number of files that are written at the same time.

    Returns:
        The type of each tensor.

    Raises:
        OSError: the file cannot be written.
        CheckpointDamaged: the checkpoint cannot be read.
    """
    origin: dict[str, tuple[Parameter, int, int]] = {}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for parameter in parameters:
        kept, shapes = dtype or weights.dtype(parameter.name), parameter.tensors(model)
        for number, piece in enumerate(parameter.pieces):
            for part, name in enumerate(piece):
                origin[name], kinds[name] = (parameter, number, part), (kept, shapes[name])
    shards = _group(kinds, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]

    def write(item: tuple[str, list[str]]) -> None:
        file, shard = item
        made = _split_pieces(weights, origin, model)
        write_stream(directory / file, {n: kinds[n] for n in shard}, made, metadata={"format": "pt"})

    in_threads(threads, write, zip(names, shards, strict=True))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(*kind) for kind in kinds.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {name: kind for name, (kind, _) in kinds.items()}


def _split_pieces(
    weights: CheckpointWeights, origin: Mapping[str, tuple[Parameter, int, int]], model: ModelConfig
) -> Callable[[str], list[Tensor]]:
    """name -> [the tensor]. The last piece is cached, since its tensors are written one after the other."""
    last: tuple[tuple[str, int], list[Tensor]] | None = None

    def make(name: str) -> list[Tensor]:
        nonlocal last
        parameter, number, part = origin[name]
        if last is None or last[0] != (parameter.name, number):
            last = None  # frees it before the next is read
            whole = weights.read(parameter.name, number if parameter.per_expert else None)
            last = (parameter.name, number), parameter.layout.split(whole, model)
        return [last[1][part]]

    return make


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _group(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[list[str]]:
    """The names of the tensors of each file, in order; a file exceeds the limit only if it has a single tensor."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, kind in kinds.items():
        size = _bytes(*kind)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"
