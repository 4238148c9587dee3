"""Contenders in processes of their own, as their users run them: what one of them tells the C library or torch does not
change how the others run. They take turns, so that whatever else the machine does falls on all alike."""

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.contest import quietly, synchronise

Questions = Mapping[str, Callable[[], Any]]
"""What a contender can be asked, by name; the answers travel between processes."""


class Apart:
    """A contender in a process of its own."""

    def __init__(self, name: str, build: Callable[[], Questions], *, keep_memory: bool):
        """Args:
        build: called in the new process; a function of a module with arguments bound to it, since it travels there.
        keep_memory: tell its C library to keep freed memory, as a run of ours on a CPU does for itself.
        """
        self.name = name
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch comes, with the module of `build`
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, keep_memory), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str) -> Any:
        self._pipe.send(question)
        return self.hear(question)

    def hear(self, question: str) -> Any:
        """The answer to what was asked before."""
        try:
            failed, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            failed, answer = True, f"its process ended with {self._process.exitcode}"
        if failed:
            raise RuntimeError(f"{self.name}, asked for {question!r}: {answer}")
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def apart(
    builds: Mapping[str, Callable[[], Questions]], ours: tuple[str, ...], *, peers_keep_memory: bool
) -> Iterator[dict[str, Apart]]:
    """All contenders by name, built and ready."""
    with ExitStack() as stack:
        players = {}
        for name, build in builds.items():
            players[name] = Apart(name, build, keep_memory=peers_keep_memory or name in ours)
            stack.callback(players[name].close)
        for player in players.values():
            player.hear("its construction")
        yield players


KEEP_MEMORY = "let the peers' C library keep freed memory too, which on a CPU speeds them up; as installed it does not"
"""Help for an option --peers-keep-memory."""


def take_turns(players: Mapping[str, Apart], question: str, repetitions: int) -> dict[str, float]:
    """Asks A B C A B C ... for seconds; the medians. The first round, in which kernels are chosen and memory is first
    touched, does not count."""
    rounds = [{name: player.ask(question) for name, player in players.items()} for _ in range(repetitions + 1)]
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in players}


def timed(step: Callable[[], object]) -> Callable[[], float]:
    """Seconds that a step takes."""

    def run() -> float:
        start = time.perf_counter()
        step()
        synchronise()
        return time.perf_counter() - start

    return run


def _serve(pipe: Connection, build: Callable[[], Questions], keep_memory: bool) -> None:
    if not keep_memory:
        # Megatron-Core runs under our engine, which takes the allocator for set by the user and leaves it alone.
        os.environ.setdefault("GLIBC_TUNABLES", "")
    with quietly():
        from parallel.allocator import keep_freed_memory

        if keep_memory:
            keep_freed_memory()
        questions: Questions = {}
        question = None
        while True:
            try:
                if question is None:
                    questions = build()
                pipe.send((False, question and questions[question]()))
            except Exception:
                pipe.send((True, traceback.format_exc()))
            try:
                question = pipe.recv()
            except EOFError:
                return
