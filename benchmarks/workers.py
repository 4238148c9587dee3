"""Runs each implementation in its own process, so that settings of the C library or PyTorch do not affect the others.

Measurements alternate between the implementations, so that other load on the machine affects all of them.
"""

import multiprocessing
import os
import statistics
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.measurement import quietly, synchronise
from parallel.threads import limit_spinning

Measurements = Mapping[str, Callable[[], Any]]
"""The measurements of an implementation, by name. Results are pickled."""


class Worker:
    """An implementation in its own process."""

    def __init__(self, name: str, build: Callable[[], Measurements], *, as_ours: bool):
        """
        Args:
            build: called in the new process; must be picklable.
            as_ours: with the settings of a training run on a CPU: the allocator keeps freed memory, and waiting threads
                sleep soon.
        """
        self.name = name
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before PyTorch is imported, with the module of `build`
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, as_ours), daemon=True)
        with unittest.mock.patch.dict(os.environ):
            if as_ours:
                limit_spinning()
            self._process.start()
        theirs.close()

    def measure(self, name: str) -> Any:
        self._pipe.send(name)
        return self.receive(name)

    def receive(self, name: str) -> Any:
        """The result of the measurement that was requested."""
        try:
            failed, result = self._pipe.recv()
        except EOFError:
            self._process.join()
            failed, result = True, f"its process ended with {self._process.exitcode}"
        if failed:
            raise RuntimeError(f"{self.name}, {name!r}: {result}")
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def start_workers(
    builds: Mapping[str, Callable[[], Measurements]], ours: tuple[str, ...], *, peers_as_ours: bool
) -> Iterator[dict[str, Worker]]:
    """The workers by name, after building their implementations."""
    with ExitStack() as stack:
        workers = {}
        for name, build in builds.items():
            workers[name] = Worker(name, build, as_ours=peers_as_ours or name in ours)
            stack.callback(workers[name].close)
        for worker in workers.values():
            worker.receive("build")
        yield workers


SETTLE = 0.2
"""Seconds before each measurement: OpenMP's threads, as installed, spin for a while after the previous one, and would
occupy cores."""

AS_OURS = "apply the settings of a training run on a CPU to all: freed memory is kept, waiting threads sleep soon"
"""Help text of the option --peers-as-ours."""


def alternate(workers: Mapping[str, Worker], name: str, repetitions: int) -> dict[str, float]:
    """The median of a measurement in seconds for each worker, measured in the order A B C A B C ... The first round, in
    which kernels are selected and memory is first touched, is a warm-up."""

    def once(worker: Worker) -> float:
        time.sleep(SETTLE)
        return worker.measure(name)

    rounds = [{key: once(worker) for key, worker in workers.items()} for _ in range(repetitions + 1)]
    return {key: statistics.median(r[key] for r in rounds[1:]) for key in workers}


def timed(step: Callable[[], object]) -> Callable[[], float]:
    """A function that runs a step and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        step()
        synchronise()
        return time.perf_counter() - start

    return run


def _serve(pipe: Connection, build: Callable[[], Measurements], as_ours: bool) -> None:
    if not as_ours:
        # Prevents the engine, under which Megatron-Core runs, from configuring the allocator.
        os.environ.setdefault("GLIBC_TUNABLES", "")
    with quietly():
        from parallel.allocator import keep_freed_memory

        if as_ours:
            keep_freed_memory()
        measurements: Measurements = {}
        name = None
        while True:
            try:
                if name is None:
                    measurements = build()
                pipe.send((False, name and measurements[name]()))
            except Exception:
                pipe.send((True, traceback.format_exc()))
            try:
                name = pipe.recv()
            except EOFError:
                return
