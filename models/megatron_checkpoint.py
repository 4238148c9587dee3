"""Reads checkpoints that Megatron-Core's dist_checkpointing has written (torch_dist, which is PyTorch's distributed
checkpoint): the names and shapes of the tensors, and one slice at a time."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ALLOWED = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "collections": {"OrderedDict"},
}
"""The globals that a .metadata file, which is pickled, may name."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")
        return super().find_class(module, name)


class MegatronCheckpoint:
    """The model of a checkpoint of Megatron-Core.

    Args:
        directory: with .metadata and .distcp files, or Megatron-LM's --save directory, whose latest checkpoint is read.

    Raises:
        ValueError: it is not a torch_dist checkpoint, or cannot be read.
    """

    def __init__(self, directory: Path):
        self.directory = directory = _latest(directory)
        if not (directory / ".metadata").is_file():
            raise ValueError(f"{directory} is no torch_dist checkpoint of Megatron-Core: it has no .metadata")
        try:
            with (directory / ".metadata").open("rb") as file:
                self._metadata = _Unpickler(file).load()
            if (kind := directory / "metadata.json").is_file():
                backend = json.loads(kind.read_bytes()).get("sharded_backend")
                if backend != "torch_dist":
                    raise ValueError(f"its format is {backend}, not torch_dist")
            listed = self._metadata.state_dict_metadata
            self.tensors = {
                name: (entry.properties.dtype, tuple(entry.size)) for name, entry in listed.items() if _is_tensor(entry)
            }
        except (OSError, ValueError, AttributeError, EOFError, ImportError, pickle.UnpicklingError) as error:
            raise ValueError(f"{directory} cannot be read: {error}") from None
        """name -> (type, shape). Tensors of all layers, and of all experts, may be stacked along leading dimensions."""
        self.objects = [name for name in listed if name not in self.tensors]
        """The names of everything else."""

    def read(self, name: str, leading: tuple[int, ...] = ()) -> Tensor:
        """A tensor, or its slice at these indices of the leading dimensions.

        Raises:
            ValueError: a part is missing or cannot be read.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex

        dtype, shape = self.tensors[name]
        target, count = torch.empty(shape[len(leading) :], dtype=dtype), 0
        for chunk in self._metadata.state_dict_metadata[name].chunks:
            inside = [index - first for index, first in zip(leading, chunk.offsets, strict=False)]
            if not all(0 <= i < size for i, size in zip(inside, chunk.sizes, strict=False)):
                continue
            stored = self._load(name, self._metadata.storage_data.get(MetadataIndex(name, chunk.offsets)))
            if tuple(stored.shape) != tuple(chunk.sizes):
                raise ValueError(f"{self.directory}: a part of {name} is {[*stored.shape]} instead of {[*chunk.sizes]}")
            part = stored[tuple(inside)]
            rest = zip(chunk.offsets[len(leading) :], part.shape, strict=True)
            target[tuple(slice(first, first + size) for first, size in rest)] = part
            count += part.numel()
        if count != target.numel():
            raise ValueError(f"{self.directory}: {name} is incomplete")
        return target

    def _load(self, name: str, where: Any) -> Tensor:
        try:
            if where is None or Path(where.relative_path).name != where.relative_path:
                raise ValueError("it has no place in a file")
            if getattr(where, "transform_descriptors", None):
                raise ValueError("it is compressed")
            with (self.directory / where.relative_path).open("rb") as file:
                file.seek(where.offset)
                content = io.BytesIO(file.read(where.length))
            return torch.load(content, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.directory}: {name} cannot be read: {error}") from None


def _is_tensor(entry: Any) -> bool:
    return hasattr(entry, "chunks")


def _latest(directory: Path) -> Path:
    """The directory itself, or the checkpoint that Megatron-LM's latest_checkpointed_iteration.txt in it names."""
    latest = directory / "latest_checkpointed_iteration.txt"
    if (directory / ".metadata").is_file() or not latest.is_file():
        return directory
    word = latest.read_text().strip()
    return directory / (f"iter_{int(word):07d}" if word.isdecimal() else "release")
