"""Texts to token ids in batches, on all cores: by threads of this process or by worker processes, in the same order.

Threads share the interpreter lock and one cache of words. So a large corpus is encoded by a process for each core, in
a single thread each; below a minute of work starting them would take longer than they save.

Legend: N tokens, P pieces of documents.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import numpy as np

from corpus.tokenizer import Tokenizer

_ROOT = Path(__file__).resolve().parent.parent
_AHEAD = 2
"""Batches that a worker has: one that it encodes and the next one."""
_FINISHED = 2
"""Batches for each worker that may be finished before an earlier one is."""
_LEAVE_SECONDS = 5.0


Write = Callable[[np.ndarray, np.ndarray], None]
"""Called with the ids of a batch, one text after the other [N], and the number of tokens of each text, int64 [P]."""


class Encoder:
    """Encodes on the threads of this process."""

    batch_characters = 4 * 2**20
    """Characters of a batch, at which the time that it takes outweighs what a batch costs."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype

    def put(self, texts: list[str], last: list[bool], write: Write) -> None:
        """Encodes texts that are pieces of documents, now or later. The results of all batches are passed to their
        `write` in the order in which the batches came, by later calls of `put` and `drain` at the latest.

        Args:
            last: whether each piece ends its document: it gets an end-of-document token.
        """
        write(*(self._tokenizer.encode_pieces(texts, last, self._dtype) if texts else self._nothing()))

    def _nothing(self) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(0, self._dtype), np.empty(0, np.int64)

    def drain(self) -> None:
        """Waits until all results are written."""

    def close(self) -> None:
        """Ends the workers, whatever they do."""


class _Worker:
    def __init__(self, tokenizer: bytes) -> None:
        self.connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "corpus.encode_worker", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.waiting: deque[_Task] = deque()
        self.connection.send_bytes(tokenizer)

    def failed(self) -> RuntimeError:
        code = self.process.wait()
        why = "; it was killed, maybe because the memory is full" if code < 0 else ""
        return RuntimeError(f"a process that tokenises ended with exit code {code}{why}")


@dataclass
class _Task:
    count: int
    """Number of texts."""
    write: Write
    result: tuple[np.ndarray, np.ndarray] | None = None


class EncoderPool(Encoder):
    """Encodes in worker processes (`corpus/encode_worker.py`). They end with this process, however it ends."""

    batch_characters = 2**20

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> None:
        super().__init__(tokenizer, dtype)
        start = pickle.dumps((tokenizer, dtype))
        self._workers: list[_Worker] = []
        self._tasks: deque[_Task] = deque()
        """In the order in which they came."""
        try:
            for _ in range(workers):
                self._workers.append(_Worker(start))
        except OSError:
            self.close()
            raise

    def put(self, texts: list[str], last: list[bool], write: Write) -> None:
        self._receive(timeout=0)
        while True:
            self._write_finished()
            worker = min(self._workers, key=lambda worker: len(worker.waiting))
            if len(worker.waiting) < _AHEAD and len(self._tasks) < (_AHEAD + _FINISHED) * len(self._workers):
                break
            self._receive(timeout=None)
        task = _Task(len(texts), write, None if texts else self._nothing())
        self._tasks.append(task)
        if not texts:
            return self._write_finished()
        worker.waiting.append(task)
        try:
            worker.connection.send_bytes(pickle.dumps((texts, last), protocol=pickle.HIGHEST_PROTOCOL))
        except OSError:
            raise worker.failed() from None
        return None

    def drain(self) -> None:
        self._write_finished()
        while self._tasks:
            self._receive(timeout=None)
            self._write_finished()

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_LEAVE_SECONDS)
            worker.process.kill()
            worker.process.wait()

    def _write_finished(self) -> None:
        while self._tasks and (result := self._tasks[0].result) is not None:
            self._tasks.popleft().write(*result)

    def _receive(self, timeout: float | None) -> None:
        by_connection = {worker.connection: worker for worker in self._workers if worker.waiting}
        for connection in wait(list(by_connection), timeout):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                raise worker.failed() from None
            task = worker.waiting.popleft()
            lengths_P = np.frombuffer(message, np.int64, task.count)
            task.result = np.frombuffer(message, self._dtype, offset=lengths_P.nbytes), lengths_P


def open_encoder(tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> Encoder:
    """
    Args:
        workers: worker processes. 0: none, the threads of this process encode.
    """
    return EncoderPool(tokenizer, dtype, workers) if workers else Encoder(tokenizer, dtype)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
