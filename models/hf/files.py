"""Reads the files of a Hugging Face model: tensors from sharded safetensors, and the files that accompany them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from models.hf.configuration import read_json
from models.hf.family import Family
from models.hf.fused import Part, split_fused
from models.hf.quantization import FP8, dequantise, scales_of
from parallel.checkpoint_format import DTYPES, CheckpointDamaged, TensorFile, TensorShard
from parallel.checkpoint_manifest import run_to_completion

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COMPANION_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)
"""Files that an import copies to the run, and an export copies back."""
FLOATS = ("F32", "F16", "BF16", FP8)


class Source:
    """The tensors of a model directory, with one tensor per expert, read one at a time. FP8 weights are fp32 here. Use
    it as a context manager; threads may share it.

    Args:
        block: the block of an FP8 weight that shares a scale (models.hf.quantization.block_of).

    Raises:
        ValueError: no safetensors files, a missing or damaged shard, an index that does not match the shards, or scales
            that do not match the FP8 weights.
    """

    def __init__(self, directory: Path, family: Family, block: tuple[int, int] | None = None):
        self.directory = directory
        self._stack = ExitStack()
        self._of: dict[str, TensorFile] = {}
        self.stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        """name -> (safetensors dtype, shape) of the tensors in the files."""
        try:
            for shard in self._shards():
                self._open(shard)
            self.block, self.scales = block, scales_of(self.stored, block, directory)
            weights = self.stored | {name: ("F32", self.stored[name][1]) for name in self.scales}
            for scale in self.scales.values():
                del weights[scale]
            self.entries, self._parts = split_fused(family, weights)
            """name -> (safetensors dtype, shape) of the tensors that `read` returns."""
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _shards(self) -> list[Path]:
        self._index: dict[str, str] | None = None
        if (self.directory / INDEX).is_file():
            found = read_json(self.directory / INDEX).get("weight_map")
            if not (isinstance(found, dict) and all(isinstance(v, str) and Path(v).name == v for v in found.values())):
                raise ValueError(f"{self.directory / INDEX} has no weight_map from tensors to files")
            self._index = found
            return [self.directory / name for name in sorted(set(found.values()))]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f"; {pickled[0]} is pickled: save_pretrained of Transformers writes safetensors" if pickled else ""
        raise ValueError(f"{self.directory} holds neither {SINGLE} nor {INDEX}{hint}")

    def _open(self, shard: Path) -> None:
        try:
            file = self._stack.enter_context(TensorFile(shard))
            entries = file.entries()
        except OSError as error:
            raise ValueError(f"{shard} cannot be read: {error.strerror or error}") from None
        except CheckpointDamaged as error:
            raise ValueError(f"{self.directory}: {error}") from None
        if twice := sorted(entries.keys() & self.stored.keys()):
            raise ValueError(f"{shard} has {twice[0]}, which is also in another shard")
        if self._index is not None:
            listed = {name for name, where in self._index.items() if where == shard.name}
            if lost := sorted(listed - entries.keys()):
                raise ValueError(f"{shard} lacks {', '.join(lost[:5])}, which {INDEX} lists there")
            if extra := sorted(entries.keys() - listed):
                raise ValueError(f"{shard} holds {', '.join(extra[:5])}, which {INDEX} does not list there")
        for name, (dtype, _) in entries.items():
            if dtype not in FLOATS:
                raise ValueError(f"{shard}: {name} is of type {dtype}; supported are {', '.join(FLOATS)}")
        self.stored |= entries
        self._of |= dict.fromkeys(entries, file)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name][0]]

    def read(self, name: str) -> Tensor:
        """A tensor, in the type that `entries` has for it."""
        part = self._parts.get(name, Part(name))
        tensor = self._read(part.tensor, part.expert)
        if part.tensor in self.scales:
            assert self.block is not None
            tensor = dequantise(tensor, self._read(self.scales[part.tensor], part.expert), self.block)
        return tensor if part.half is None else tensor.chunk(2)[part.half]

    def _read(self, name: str, index: int | None) -> Tensor:
        """A stored tensor, or one slice along its first dimension."""
        dtype, shape = self.stored[name]
        origin = (0,) * len(shape)
        target = torch.empty(shape if index is None else (1, *shape[1:]), dtype=DTYPES[dtype])
        try:
            shard, offset = TensorShard("", origin, shape), (index or 0, *origin[1:])
            run_to_completion(self._of[name].copy(name, shard, target, offset))
        except (OSError, CheckpointDamaged) as error:
            raise ValueError(f"{self.directory}: {name} cannot be read: {error}") from None
        return target if index is None else target[0]

    def described(self, idle: list[str]) -> str:
        """How many tensors were read, and their types.

        Args:
            idle: of `entries`: were not read.
        """
        unread = {*idle, *(scale for name, scale in self.scales.items() if name in idle)}
        types = sorted({dtype for name, (dtype, _) in self.stored.items() if name not in unread})
        return f"{len(self.stored.keys() - unread)} tensors in {', '.join(types)}"


def companion_files(directory: Path) -> Iterator[Path]:
    """The COMPANION_FILES of a model directory that exist."""
    return (directory / name for name in COMPANION_FILES if (directory / name).is_file())
