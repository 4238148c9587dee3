"""`python -m launch.chat checkpoint=DIR`: a conversation with a model in the terminal. /reset begins a new one, /system
TEXT one with this system message; Ctrl-C stops an answer, Ctrl-D ends."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from conf.commands import ChatConfig
from conf.printable import visible
from launch.cli import command
from launch.generate import check_settings, tokenizer_of
from parallel.env import World, started_ranks
from training.load_checkpoint import load_model, on_every_rank
from training.noncausal import check_can_generate

if TYPE_CHECKING:
    from training.chat import Conversation

HELP = "/reset: a new conversation; /system TEXT: one with this system message; Ctrl-C: stop an answer; Ctrl-D: end"
_POLL_SECONDS = 0.02


def main(config: ChatConfig) -> int:
    """Answers until the end of standard input. Returns the exit code 0.

    Raises:
        ValueError: no such checkpoint, a model that cannot generate text, or invalid settings.
    """
    check_settings(config)
    world, simulated = started_ranks()
    if simulated == 1:
        return chat_rank(world, config)
    # Simulated ranks have no terminal: this process reads it for them.
    here, there = Pipe()
    run = partial(chat_rank, typist=Relayed(there, sys.stdin.isatty()))
    with ThreadPoolExecutor(1) as executor:
        ranks = executor.submit(on_every_rank, run, config)
        ranks.add_done_callback(lambda _: there.send(None))
        _relay(here)
        return ranks.result()


def _relay(ranks: Connection) -> None:
    """Sends what is typed to rank 0, a line whenever it asks for one, until it has ended."""
    typist = Typist()
    while True:
        try:
            asked = ranks.recv()
        except KeyboardInterrupt:
            ranks.send(Relayed.STOP)
            continue
        if asked is None:
            return
        ranks.send(typist.line())


class Typist:
    """Who types in this process's terminal, or writes into its standard input."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._lines = _lines("> " if self.is_terminal else "")
        self._stop = False

    def line(self) -> str | None:
        """What is typed next; None at the end."""
        return next(self._lines, None)

    @contextlib.contextmanager
    def may_stop(self) -> Iterator[Callable[[], bool]]:
        """Gives the function that says whether Ctrl-C was pressed in the meantime. It interrupts no pass of the model,
        which would leave a part of a token in the cache."""
        self._stop = False
        before = signal.signal(signal.SIGINT, self._note_stop)
        try:
            yield lambda: self._stop
        finally:
            signal.signal(signal.SIGINT, before)

    def _note_stop(self, *_: object) -> None:
        self._stop = True


class Relayed:
    """Who types in the terminal of the process that simulates the ranks (`_relay`)."""

    STOP = b"stop"

    def __init__(self, connection: Connection, is_terminal: bool) -> None:
        self._connection, self.is_terminal = connection, is_terminal

    def line(self) -> str | None:
        self._connection.send("line")
        while (line := self._connection.recv()) == self.STOP:  # an answer ended at the same time
            pass
        return line

    @contextlib.contextmanager
    def may_stop(self) -> Iterator[Callable[[], bool]]:
        yield self._stopped

    def _stopped(self) -> bool:
        return self._connection.poll() and self._connection.recv() == self.STOP


def chat_rank(world: World, config: ChatConfig, typist: Typist | Relayed | None = None) -> int:
    """`main` on one rank. All ranks have the same conversation; rank 0 prints, and has the one who types."""
    with load_model(config.checkpoint, config, world) as loaded:
        check_can_generate(loaded.built.config.model)
        from training.chat import Conversation
        from training.generate import Sampling

        sampling = Sampling(config.max_tokens, config.temperature, config.top_k, config.top_p, config.seed)
        talk = Conversation(loaded.built, tokenizer_of(loaded), loaded.run_dir, sampling, config.stop)
        talk.reset(config.system)
        here = (typist or Typist()) if world.rank == 0 else None
        tell = partial(print, flush=True) if here else _nothing
        if here and here.is_terminal:
            tell(f"{loaded.directory}, {talk.format.template.name}\n{HELP}")
        for line in _shared(here, world):
            if line.startswith("/"):
                tell(_command(talk.reset, line))
            elif line.strip():
                _answer(talk, line, here, world, tell)
    return 0


def _nothing(*_: object, **__: object) -> None:
    """Other ranks print nothing."""


def _shared(typist: Typist | Relayed | None, world: World) -> Iterator[str]:
    """What is typed, line by line, on every rank. The ranks that wait for it ask the store: a collective would have a
    timeout."""
    if world.size == 1:
        assert typist is not None
        yield from iter(typist.line, None)
        return
    from parallel.torch_private import default_store

    store, number = default_store(), 0
    while True:
        name, number = f"chat line {number}", number + 1
        if typist is not None:
            store.set(name, json.dumps(typist.line()))
        while not store.check([name]):
            time.sleep(_POLL_SECONDS)
        line = json.loads(store.get(name))
        if line is None:
            return
        yield line


def _command(reset: Callable[..., None], line: str) -> str:
    """Runs a command. Returns what to tell."""
    name, _, rest = line.strip().partition(" ")
    if name == "/reset":
        reset()
        return "a new conversation"
    if name == "/system":
        reset(rest.strip() or None)
        return "a new conversation, " + ("with this system message" if rest.strip() else "without a system message")
    return HELP if name == "/help" else f"no command {visible(name)}. {HELP}"


def _answer(
    talk: "Conversation", line: str, typist: Typist | Relayed | None, world: World, tell: Callable[..., None]
) -> None:
    """Prints the answer to a message as it comes."""
    note = ""
    pieces = talk.answer(line)
    with typist.may_stop() if typist else contextlib.nullcontext(lambda: False) as stopped:
        try:
            for piece in pieces:
                tell(visible(piece), end="")
                if _agreed(stopped(), world):
                    note = " [stopped]"
                    break
        except ValueError as error:
            note = f"[{visible(str(error))}]"
        pieces.close()
    if talk.finish_reason == "length":
        note = " [max_tokens reached]"
    if talk.is_cut:
        note += f" [the conversation is longer than {talk.limit} tokens: the model has not seen its beginning]"
    tell(note)


def _agreed(stop: bool, world: World) -> bool:
    """Whether rank 0 wants to stop."""
    if world.size == 1:
        return stop
    import torch.distributed as dist

    wanted = [stop]
    dist.broadcast_object_list(wanted, src=0)
    return wanted[0]


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, line by line; Ctrl-C gives a line up."""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines and has a history)
    while True:
        try:
            yield _typed(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)


def _typed(prompt: str) -> str:
    """input(), which edits lines only on the process's own standard output (training.output_redirect has another)."""
    if not prompt:
        return input()
    ours, kept = sys.stdout, os.dup(1)
    os.dup2(ours.fileno(), 1)
    sys.stdout = sys.__stdout__
    try:
        return input(prompt)
    finally:
        sys.stdout = ours
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    command(ChatConfig, "chat", main)
