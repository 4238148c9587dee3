"""Conversations in the rows of .jsonl and .parquet files, in the forms that data sets have."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from corpus.documents import BadRow, SkippedRows, read_rows

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_SHAREGPT |= {"function_response": "tool", "function_call": "assistant"}
FORMS = "messages; prompt and completion; conversations; or instruction, input and output"
WEIGHTS, FIRST_LABEL = ".weights", ".first_label"
"""Suffixes of the files beside .bin/.idx: the loss weight of each token as a target, float32; and of each conversation
the index of the first token with one, int32."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    messages: Messages
    """As a chat template takes them; at least one is the assistant's."""
    tools: list[dict[str, Any]] | None
    """JSON schemas of the functions that the assistant may call."""
    where: str
    """Line or row of the file."""
    done: float
    """Fraction of the file read so far."""

    @property
    def text(self) -> str:
        """What the messages say, without roles."""
        return "\n".join(message_text(message) for message in self.messages)


class EmptyTurn(ValueError):
    """A message of the assistant that says nothing."""


def message_text(message: dict[str, Any]) -> str:
    """The content of a message, and its calls of functions as JSON."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return (content or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def read_conversations(
    path: str, *, strict: bool = False, skipped: SkippedRows | None = None
) -> Iterator[Conversation]:
    """The conversations of a file, in order.

    Args:
        path: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.
        strict: raise an error for a row that is not a conversation.
        skipped: counts such rows otherwise.

    Raises:
        BadFile: the file is damaged, or no row is a conversation; the message names the file and the line.
        ValueError: the file cannot be read, or with `strict` a row is not a conversation.
    """
    skipped = SkippedRows() if skipped is None else skipped
    usable = False
    for where, row, done, _ in read_rows(path):
        if not isinstance(row, BadRow):
            try:
                messages, tools = conversation_of(row)
            except ValueError as error:
                row = BadRow(where, f": {error}")
            else:
                usable = True
                yield Conversation(messages, tools, where, done)
                continue
        skipped.add(row, path, strict=strict)
    if not usable:
        skipped.check_usable(path)


def conversation_of(row: dict[str, Any]) -> tuple[Messages, list[dict[str, Any]] | None]:
    """The messages and tools of a row. Raises ValueError if it is not a conversation with an assistant's message."""
    row = _without_none(row)
    form = next((form for field, form in _FORMS.items() if field in row), None)
    if form is None:
        raise ValueError(f"no conversation: it needs {FORMS}, but it has {', '.join(row) or 'no field'}")
    messages = checked_messages(form(row))
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant")
    tools = _tools(row.get("tools"))
    check_characters([messages, tools])
    return messages, tools


def checked_messages(messages: Messages) -> Messages:
    """The messages as templates take them. Raises ValueError if one is not a message."""
    return [_checked(message, number) for number, message in enumerate(messages, start=1)]


def check_characters(value: Any) -> None:
    """Raises ValueError for texts, in a string or in what is made of strings, that no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("its text has half a surrogate pair, which is no character") from None


def _of_messages(row: dict[str, Any]) -> Messages:
    return _list_of_objects(row["messages"], "messages")


def _of_prompt(row: dict[str, Any]) -> Messages:
    """Both strings, or both lists of messages."""
    messages = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        if field not in row:
            raise ValueError(f"prompt without {field}")
        value = row[field]
        if not isinstance(value, (str, list)):
            raise ValueError(f"field {field!r} is {type(value).__name__}, not a string or a list of messages")
        messages += [{"role": role, "content": value}] if isinstance(value, str) else _list_of_objects(value, field)
    return messages


def _of_sharegpt(row: dict[str, Any]) -> Messages:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in enumerate(_list_of_objects(row["conversations"], "conversations"), start=1):
        if "role" in turn:
            messages.append(turn)
            continue
        if "from" not in turn or "value" not in turn:
            raise ValueError(f"turn {number} has no 'from' and 'value', only {', '.join(turn) or 'nothing'}")
        role = str(turn["from"])
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({"role": _SHAREGPT.get(role, role), "content": turn["value"], **others})
    return messages


def _of_alpaca(row: dict[str, Any]) -> Messages:
    if "output" not in row:
        raise ValueError("instruction without output")
    question = "\n\n".join(str(row[field]) for field in ("instruction", "input") if row.get(field))
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


_FORMS: dict[str, Callable[[dict[str, Any]], Messages]] = {
    "messages": _of_messages,
    "prompt": _of_prompt,
    "conversations": _of_sharegpt,
    "instruction": _of_alpaca,
}
"""The field that tells the form of a row."""


def _list_of_objects(value: Any, field: str) -> Messages:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"field {field!r} is not a list of objects, or is empty")
    return value


def _checked(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message as templates take it. Raises ValueError if it is not one."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        what = "has no role" if role is None else f"has the unknown role {role!r}"
        raise ValueError(f"message {number} {what}; known are {', '.join(ROLES)}")
    parts = isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
    if content is not None and not isinstance(content, str) and not parts:
        raise ValueError(f"message {number} ({role}): its content is not text")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"message {number}: its tool_calls are {type(calls).__name__}, not a list")
    if role == "assistant" and not (message_text(message).strip() or message.get("reasoning_content")):
        raise EmptyTurn(f"message {number}: the turn of the assistant is empty")
    if content is None and not calls:
        raise ValueError(f"message {number} ({role}) has no content")
    weight = message.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"message {number}: its weight {weight!r} is not a number of 0 or more")
        if role != "assistant" and weight:
            raise ValueError(f"message {number} ({role}): only messages of the assistant have a weight")
    return message | {"tool_calls": [_parsed_call(call, number) for call in calls]} if calls else message


def _parsed_call(call: Any, number: int) -> dict[str, Any]:
    """With its arguments as an object, as templates expect them; OpenAI's form has them as a string of JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"message {number}: a tool call has no name")
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        function = function | {"arguments": json.loads(function["arguments"])}
    except json.JSONDecodeError as error:
        raise ValueError(f"message {number}: the arguments of a tool call are not JSON: {error.msg}") from None
    return call | {"function": function} if "function" in call else function


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"field 'tools' is not JSON: {error.msg}") from None
    return _list_of_objects(value, "tools") if value else None


def _without_none(value: Any) -> Any:
    """Without null fields: the rows of a .parquet file have every field of every row."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
