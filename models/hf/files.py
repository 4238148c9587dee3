"""Reads the files of a Hugging Face model: tensors from sharded safetensors, and the files that accompany them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from models.hf.configuration import read_json
from parallel.checkpoint_format import DTYPES, CheckpointDamaged, TensorFile, TensorShard
from parallel.checkpoint_manifest import run_to_completion

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COMPANION_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)
"""Files that an import copies to the run, and an export copies back."""
FLOATS = ("F32", "F16", "BF16")


class Source:
    """The tensors of a model directory, read one at a time. Use it as a context manager.

    Raises:
        ValueError: no safetensors files, a missing or damaged shard, or an index that does not match the shards.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._stack = ExitStack()
        self._of: dict[str, TensorFile] = {}
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        """name -> (type, shape)."""
        try:
            for shard in self._shards():
                self._open(shard)
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
            texts = isinstance(found, dict) and all(isinstance(v, str) and Path(v).name == v for v in found.values())
            if not texts:
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
        if twice := sorted(entries.keys() & self.entries.keys()):
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
        self.entries |= entries
        self._of |= dict.fromkeys(entries, file)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name][0]]

    def read(self, name: str) -> Tensor:
        """A tensor, in the type that it is stored in."""
        shape = self.entries[name][1]
        target = torch.empty(shape, dtype=self.dtype(name))
        origin = (0,) * len(shape)
        try:
            run_to_completion(self._of[name].copy(name, TensorShard("", origin, shape), target, origin))
        except OSError as error:
            raise ValueError(f"{self.directory}: {name} cannot be read: {error}") from None
        return target


def companion_files(directory: Path) -> Iterator[Path]:
    """The COMPANION_FILES of a model directory that exist."""
    return (directory / name for name in COMPANION_FILES if (directory / name).is_file())
