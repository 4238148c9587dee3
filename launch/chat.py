"""`python -m launch.chat checkpoint=DIR`: a conversation with a model in the terminal. /reset begins a new one, /system
TEXT one with this system message; Ctrl-C stops an answer, Ctrl-D ends."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from conf.commands import ChatConfig
from conf.printable import visible
from launch.cli import command
from launch.generate import check_settings, tokenizer_of
from parallel.env import started_ranks
from training.load_checkpoint import load_model
from training.noncausal import check_can_generate

if TYPE_CHECKING:
    from training.chat import Conversation

HELP = "/reset: a new conversation; /system TEXT: one with this system message; Ctrl-C: stop an answer; Ctrl-D: end"


def main(config: ChatConfig) -> int:
    """Answers until the end of standard input. Returns the exit code 0.

    Raises:
        ValueError: no such checkpoint, a model that cannot generate text, invalid settings, or more than one rank.
    """
    check_settings(config)
    world, simulated = started_ranks()
    if world.size * simulated > 1:
        raise ValueError(
            f"launch.chat reads the terminal on one rank, and there are {world.size * simulated}; start it without "
            "NPROC, torchrun and srun, or use launch.generate, which runs under every layout"
        )
    with load_model(config.checkpoint, config, world) as loaded:
        check_can_generate(loaded.built.config.model)
        from training.chat import Conversation
        from training.generate import Sampling

        sampling = Sampling(config.max_tokens, config.temperature, config.top_k, config.top_p, config.seed)
        talk = Conversation(loaded.built, tokenizer_of(loaded), loaded.run_dir, sampling, config.stop)
        talk.reset(config.system)
        terminal = sys.stdin.isatty()
        if terminal:
            print(f"{loaded.directory}, {talk.format.template.name}\n{HELP}", flush=True)
        for line in _lines("> " if terminal else ""):
            if line.startswith("/"):
                print(_command(talk.reset, line), flush=True)
            elif line.strip():
                _answer(talk, line)
    return 0


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


def _answer(talk: "Conversation", line: str) -> None:
    """Prints the answer to a message as it comes."""
    note = ""
    pieces = talk.answer(line)
    try:
        for piece in pieces:
            print(visible(piece), end="", flush=True)
    except KeyboardInterrupt:
        note = " [stopped]"
    except ValueError as error:
        note = f"[{visible(str(error))}]"
    pieces.close()
    if talk.finish_reason == "length":
        note = " [max_tokens reached]"
    if talk.is_cut:
        note += f" [the conversation is longer than {talk.limit} tokens: the model has not seen its beginning]"
    print(note, flush=True)


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
