"""Contenders in processes of their own, as their users run them: what one of them tells the C library or torch does not
change how the others run. They take turns, so that whatever else the machine does falls on all alike."""

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

from benchmarks.contest import quietly, synchronise
from parallel.threads import limit_spinning

Questions = Mapping[str, Callable[[], Any]]
"""What a contender can be asked, by name; the answers travel between processes."""


class Apart:
    """A contender in a process of its own."""

    def __init__(self, name: str, build: Callable[[], Questions], *, as_ours: bool):
        """Args:
        build: called in the new process; a function of a module with arguments bound to it, since it travels there.
        as_ours: with the settings that a run of ours on a CPU makes for itself: its C library keeps freed memory,
            and threads that wait soon sleep.
        """
        self.name = name
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch comes, with the module of `build`
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, as_ours), daemon=True)
        with unittest.mock.patch.dict(os.environ):
            if as_ours:
                limit_spinning()
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
    builds: Mapping[str, Callable[[], Questions]], ours: tuple[str, ...], *, peers_as_ours: bool
) -> Iterator[dict[str, Apart]]:
    """All contenders by name, built and ready."""
    with ExitStack() as stack:
        players = {}
        for name, build in builds.items():
            players[name] = Apart(name, build, as_ours=peers_as_ours or name in ours)
            stack.callback(players[name].close)
        for player in players.values():
            player.hear("its construction")
        yield players


SETTLE = 0.2
"""Seconds before a turn, in which the threads of the one before end their waiting: as installed, OpenMP's compute while
they wait, and would take a core from the next one."""

AS_OURS = "run peers with the settings that ours makes for itself on a CPU: memory is kept, threads wait briefly"
"""Help for an option --peers-as-ours."""


def take_turns(players: Mapping[str, Apart], question: str, repetitions: int) -> dict[str, float]:
    """Asks A B C A B C ... for seconds; the medians. The first round, in which kernels are chosen and memory is first
    touched, does not count."""

    def turn(player: Apart) -> float:
        time.sleep(SETTLE)
        return player.ask(question)

    rounds = [{name: turn(player) for name, player in players.items()} for _ in range(repetitions + 1)]
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in players}


def timed(step: Callable[[], object]) -> Callable[[], float]:
    """Seconds that a step takes."""

    def run() -> float:
        start = time.perf_counter()
        step()
        synchronise()
        return time.perf_counter() - start

    return run


def _serve(pipe: Connection, build: Callable[[], Questions], as_ours: bool) -> None:
    if not as_ours:
        # Megatron-Core runs under our engine, which takes the allocator for set by the user and leaves it alone.
        os.environ.setdefault("GLIBC_TUNABLES", "")
    with quietly():
        from parallel.allocator import keep_freed_memory

        if as_ours:
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
