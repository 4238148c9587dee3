"""Prompts for text generation: from a file, and as token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.chat_template import ChatTemplate, Message
from corpus.conversations import check_characters, checked_messages
from corpus.documents import nearest_existing
from corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer."""

    text: str = ""
    messages: Sequence[Message] | None = None
    where: str = "prompt"
    """For messages: the line of a file."""

    def row(self) -> dict[str, Any]:
        """As in a file."""
        return {"prompt": self.text} if self.messages is None else {"messages": [*self.messages]}


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: .txt, one a line, empty lines left out; .jsonl, with `prompt` or `messages` in each row.

    Raises:
        ValueError: there is no such file, or a row is not a prompt; the message names file and line.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts={path}: prompts are read from .txt (one a line) and .jsonl (prompt or messages)")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(f"prompts={path} does not exist{nearest_existing(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={path} cannot be read: {error}") from None
    rows = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    prompts = [Prompt(line, where=where) if file.suffix == ".txt" else _parsed(line, where) for where, line in rows]
    if not prompts:
        raise ValueError(f"prompts={path} has no prompts")
    return prompts


def _parsed(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    try:
        check_characters(row)
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and "messages" not in row:
            return Prompt(row["prompt"], where=where)
        messages = row.get("messages") if isinstance(row, dict) else None
        if isinstance(messages, list) and messages and "prompt" not in row:
            if all(isinstance(message, dict) for message in messages):
                return Prompt(messages=checked_messages(messages), where=where)
            raise ValueError("each of messages needs a role and its content")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    raise ValueError(f"{where} needs either prompt, a string, or messages, a list of role and content")


class ChatFormat:
    """How conversations become token ids, and what ends the model's turn."""

    def __init__(self, tokenizer: Tokenizer, run_dir: Path):
        """run_dir: has the template beside the tokenizer; without one the default template is used."""
        self.tokenizer = tokenizer
        eod = None if tokenizer.eod_id is None else tokenizer.token(tokenizer.eod_id)
        self.template = ChatTemplate.of(run_dir, *([] if eod is None else [eod]))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation up to where the model answers.

        Raises:
            ValueError: the template refuses the conversation.
        """
        return self.encode_text(self.template.render(messages, add_generation_prompt=True))

    def encode_text(self, text: str) -> list[int]:
        """The tokens of what the template has written, special ones among them."""
        return self.tokenizer.encode_with_special(text)[0]

    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: that of a document, and the special token that the template writes after an
        assistant's message.

        Raises:
            ValueError: the template refuses a question with an answer, or leaves the answer out.
        """
        found = set() if self.tokenizer.eod_id is None else {self.tokenizer.eod_id}
        answer = "switchyard"
        text = self.template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
        if answer not in text:
            raise ValueError(
                f"{self.template.name} does not write what the assistant says: no model can answer with it"
            )
        after, _ = self.tokenizer.encode_with_special(text[text.rindex(answer) + len(answer) :])
        found.update(next(([i] for i in after if self.tokenizer.is_special(i)), []))
        return frozenset(found)
