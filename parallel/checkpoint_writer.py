"""One checkpoint on its way to the disk: planned by all ranks together, written by each on its own, also while training
goes on, and completed together. Megatron-Core plans, proves that the boxes of all ranks tile every tensor, and knows
the format; the writing itself is done here, in a thread instead of its processes, which may die without a word."""

import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Writing:
    """The tensors that this rank puts into a checkpoint, from the plan to the files.

    Args:
        tensors: name -> Megatron-Core's description of a box; memory that nobody else changes.
        aside: an empty directory, the same on all ranks.

    Raises:
        OSError, CheckpointException: the disk does not take it.
        CheckpointingException: on rank 0, the boxes of all ranks overlap or leave holes.
    """

    def __init__(self, tensors: dict[str, Any], aside: Path):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        self.aside = aside
        self.error: OSError | None = None
        self.hashed: dict[str, list[Any]] = {}
        """name -> [bytes, digest] of the files that this rank wrote."""
        # Megatron-Core's own queue is a server process per rank, for writers that are processes.
        filesystem_async._results_queue = self._results = queue.Queue()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        self._request = dist_checkpointing.save(tensors, str(aside), strategy, async_sharded_save=True)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to write; nothing else is waited for."""
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        """Whether this rank's files are written, or cannot be."""
        assert self._thread is not None
        return not self._thread.is_alive()

    def finish_files(self) -> None:
        """Waits for this rank's files.

        Raises:
            OSError: what kept them from being written.
        """
        assert self._thread is not None
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        if self._request.async_fn is None:  # nothing to write on this rank
            return
        _, buckets, _ = self._request.async_fn_args
        transforms, _ = self._request.async_fn.args
        written, one = {}, queue.Queue()
        for index, bucket in enumerate(buckets):
            FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, one, _NobodyCounts(), use_fsync=True)
            _, written[index] = one.get()
            if isinstance(written[index], Exception):
                failed = written[index]
                self.error = failed if isinstance(failed, OSError) else OSError(f"{type(failed).__name__}: {failed}")
                return
        self._results.put(written)
        try:
            for file, name, _ in buckets:
                self.hashed[name] = [Path(file).stat().st_size, digest(Path(file))]
        except OSError as error:
            self.error = error

    def complete(self) -> None:
        """Writes the index, on rank 0, once every rank's files are there. Every rank calls it together."""
        for finish in self._request.finalize_fns:
            finish()
        if dist.get_rank() == 0:
            mine = {path.name for path in self.aside.iterdir()}
            for name in sorted(name for name in mine if not name.endswith(".distcp")):
                self.hashed[name] = [(self.aside / name).stat().st_size, digest(self.aside / name)]


class _NobodyCounts:
    """Stands for the queue in which Megatron-Core counts its writer processes."""

    get: Callable[..., None] = staticmethod(lambda: None)
    task_done: Callable[..., None] = staticmethod(lambda: None)
