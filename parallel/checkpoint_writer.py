"""One checkpoint on its way to the disk: planned by all ranks together, then written by a thread of each rank, also
while training goes on. Megatron-Core describes the boxes and proves that those of all ranks tile every tensor."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.checkpoint_format import StoredTensor, TensorShard, write_tensors


class CheckpointWriter:
    """The tensors that this rank puts into a checkpoint, from the plan to the file.

    Args:
        tensors: name -> Megatron-Core's description of a box; memory that nobody else changes.
        aside: an empty directory, the same on all ranks.

    Raises:
        CheckpointingException: on rank 0, the boxes of all ranks overlap or leave holes.
    """

    def __init__(self, tensors: dict[str, Any], aside: Path, rank: int):
        from megatron.core.dist_checkpointing import validation

        _, shards = validation.determine_global_metadata(tensors)
        validation.validate_sharding_integrity(shards)
        self.aside = aside
        self.error: Exception | None = None
        self.hashed: dict[str, list[Any]] = {}
        """name -> [bytes, digest] of the file that this rank wrote."""
        self.stored: dict[str, StoredTensor] = {}
        """What all ranks write."""
        for number, described in enumerate(shards):
            for shard in described:
                tensor = self.stored.setdefault(shard.key, StoredTensor(tuple(shard.global_shape), []))
                tensor.shards.append(
                    TensorShard(_file_of(number), tuple(shard.global_offset), tuple(shard.local_shape))
                )
        self._written = 0
        self._tensors, self._name = {shard.key: shard.data for shard in tensors.values()}, _file_of(rank)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)

    def start(self) -> None:
        """Begins to write; nothing else is waited for."""
        self._thread.start()

    def is_done(self) -> bool:
        """Whether this rank's file is written, or cannot be."""
        return not self._thread.is_alive()

    def wait(self) -> Iterator[int]:
        """Waits for this rank's file. Yields the bytes written since the last time."""
        seen = 0
        while self._thread.is_alive():
            self._thread.join(0.05)
            seen, new = self._written, self._written - seen
            yield new

    def finish_file(self) -> None:
        """Waits for this rank's file.

        Raises:
            OSError: what kept it from being written.
        """
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        if not self._tensors:  # nothing to write on this rank
            return
        try:
            self.hashed[self._name] = write_tensors(self.aside / self._name, self._tensors, self._advance)
        except Exception as error:
            self.error = error

    def _advance(self, count: int) -> None:
        self._written += count


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
