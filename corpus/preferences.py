"""Preferences between responses to a prompt: the formats of a row, and its token ids.

A row has `prompt`, `chosen` and `rejected`, or `prompt` and `responses` with the best first. Each is a string or a list
of messages. The prompt may also be the beginning that all responses have in common, as in TRL's data sets."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corpus.chat_template import ChatTemplate, encode_chat
from corpus.conversations import EmptyTurn, check_characters, checked_messages
from corpus.documents import BadRow
from corpus.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


class InvalidRow(ValueError):
    """A row that cannot be used; the message continues a sentence that begins with its position."""


@dataclass(frozen=True)
class Preference:
    """A prompt and responses to it in rank order, the best first."""

    prompt: str | Messages
    responses: list[str] | list[Messages]
    """Of the same type as the prompt."""

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def key(self) -> str:
        """Equal for equal prompts."""
        return json.dumps(self.prompt, sort_keys=True)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt with one response."""

    ids: list[int]
    counts: list[bool]
    """Whether each token is one that the model generates as part of the response."""


def parse(row: dict[str, Any] | BadRow, max_responses: int) -> Preference:
    """
    Raises:
        InvalidRow: fields are missing or of another type, a response is empty, or two are alike.
    """
    if isinstance(row, BadRow):
        raise InvalidRow(row.why.strip())
    _check_characters(row)
    responses = _responses(row)
    if not 2 <= len(responses) <= max_responses:
        more = f"; set preference.max_responses={len(responses)} with train.objective=reward"
        raise InvalidRow(f"has {len(responses)} responses{more if len(responses) > 2 else '; at least 2 are compared'}")
    given = row.get("prompt")
    if given is not None and not isinstance(given, str):
        given = _checked_messages("prompt", given)
    if all(isinstance(response, str) for response in responses):
        preference = _of_strings(given, responses)
    else:
        preference = _of_messages(given, [_as_messages(response) for response in responses])
    for number, response in enumerate(preference.responses):
        if _is_empty(response):
            raise InvalidRow(f"has an empty answer ({_name(row, number)})")
    for (i, one), (j, other) in itertools.combinations(enumerate(preference.responses), 2):
        if one == other:
            raise InvalidRow(f"has two answers alike ({_name(row, i)} and {_name(row, j)})")
    return preference


def _name(row: dict[str, Any], number: int) -> str:
    return f"responses[{number}]" if row.get("responses") is not None else ("chosen", "rejected")[number]


def _responses(row: dict[str, Any]) -> list[Any]:
    if (ranked := row.get("responses")) is not None:
        if not isinstance(ranked, list):
            raise InvalidRow(f"field 'responses' is {type(ranked).__name__}, not a list")
        named = [(f"responses[{i}]", response) for i, response in enumerate(ranked)]
    else:
        if missing := [name for name in ("chosen", "rejected") if row.get(name) is None]:
            fields = ", ".join(row) or "none"
            raise InvalidRow(f"has no field {' and no field '.join(missing)} (nor responses); its fields are {fields}")
        named = [(name, row[name]) for name in ("chosen", "rejected")]
    return [text if isinstance(text, str) else _checked_messages(name, text) for name, text in named]


def _checked_messages(name: str, messages: Any) -> Messages:
    """As those of conversations that are trained on."""
    if not isinstance(messages, list):
        raise InvalidRow(f"field {name!r} is {type(messages).__name__}, not a string or a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise InvalidRow(f"field {name!r} has an entry that is no message: {{role: ..., content: ...}}")
    try:
        return checked_messages(messages)
    except EmptyTurn:
        raise InvalidRow(f"has an empty answer ({name})") from None
    except ValueError as error:
        raise InvalidRow(f"field {name!r}: {error}") from None


def _check_characters(row: dict[str, Any]) -> None:
    try:
        check_characters(row)
    except ValueError as error:
        raise InvalidRow(f"cannot be tokenised: {error}") from None


def _as_messages(response: str | Messages) -> Messages:
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return [{k: v for k, v in message.items() if k != "weight" and v is not None} for message in response]


def _of_strings(prompt: str | Messages | None, responses: list[str]) -> Preference:
    if prompt is None:
        shared = responses[0][: min(_shared(responses[0], other) for other in responses[1:])]
        # Up to the word in which they differ, which keeps the space before it.
        cut = max(shared.rfind(" "), shared.rfind("\n"), 0)
        return Preference(shared[:cut], [response[cut:] for response in responses])
    if isinstance(prompt, str):
        return Preference(prompt, responses)
    return Preference(_as_messages(prompt), [_as_messages(response) for response in responses])


def _of_messages(prompt: str | Messages | None, responses: list[Messages]) -> Preference:
    """A prompt that is a string is one of the user, unless the responses begin with the conversation themselves."""
    whole = any(response and response[0]["role"] != "assistant" for response in responses)
    if isinstance(prompt, list):
        before = _as_messages(prompt)
        inside = all(response[: len(before)] == before for response in responses)
        return Preference(before, [response[len(before) :] if inside else response for response in responses])
    if isinstance(prompt, str) and not whole:
        return Preference([{"role": "user", "content": prompt}], responses)
    shared = 0
    for turns in zip(*responses, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    if not shared:
        raise InvalidRow("has no prompt: neither a field 'prompt' nor messages that all its answers begin with")
    return Preference(responses[0][:shared], [response[shared:] for response in responses])


def _is_empty(response: str | Messages) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any(
        message.get("role") == "assistant" and (str(message.get("content") or "").strip() or message.get("tool_calls"))
        for message in response
    )


def encode(preference: Preference, tokenizer: Tokenizer, template: ChatTemplate) -> list[Encoded]:
    """Each response after its prompt. Where the tokens of a prompt merge with those of a response, the response begins
    with the first token that differs, as in TRL.

    Raises:
        InvalidRow: the chat template refuses it, or two responses have the same tokens.
    """
    try:
        if preference.is_chat:
            prompt = tokenizer.encode_with_special(template.render(preference.prompt, add_generation_prompt=True))[0]
            whole = [encode_chat(template, tokenizer, [*preference.prompt, *r]) for r in preference.responses]
        else:
            assert tokenizer.eod_id is not None
            prompt = tokenizer.encode(preference.prompt)
            texts = tokenizer.encode_batch([preference.prompt + response for response in preference.responses])
            whole = [([*ids, tokenizer.eod_id], [1.0] * (len(ids) + 1)) for ids in texts]
    except ValueError as error:
        raise InvalidRow(f"cannot be written as a conversation: {error}") from None
    begin = min(_shared(prompt, ids) for ids, _ in whole)
    encoded = [
        Encoded(ids, [i >= max(begin, 1) and weight > 0 for i, weight in enumerate(weights)]) for ids, weights in whole
    ]
    if any(not any(one.counts) for one in encoded):
        raise InvalidRow("has an answer without tokens of the assistant")
    if any(a.ids == b.ids for a, b in itertools.combinations(encoded, 2)):
        raise InvalidRow("has two answers with the same tokens")
    return encoded


def conversation_ids(row: dict[str, Any] | BadRow, tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Token ids of a conversation to be judged, as `encode` gives those of a prompt with a response.

    Args:
        row: has `messages`, or `prompt` and `response`, each a string or a list of messages.

    Raises:
        InvalidRow: it has not, or the chat template refuses it.
    """
    if isinstance(row, BadRow):
        raise InvalidRow(row.why.strip())
    _check_characters(row)
    prompt, response = row.get("prompt"), row.get("response")
    messages = row.get("messages")
    if messages is None:
        if missing := [name for name in ("prompt", "response") if row.get(name) is None]:
            raise InvalidRow(f"has no field {' and no field '.join(missing)} (nor messages)")
        if isinstance(prompt, str) and isinstance(response, str):
            assert tokenizer.eod_id is not None
            return [*tokenizer.encode(prompt + response), tokenizer.eod_id]
        turns = []
        for name, role, given in (("prompt", "user", prompt), ("response", "assistant", response)):
            one = [{"role": role, "content": given}] if isinstance(given, str) else given
            turns += _checked_messages(name, one)
        messages = turns
    messages = _checked_messages("messages", messages)
    if not messages:
        raise InvalidRow("has no messages")
    try:
        return tokenizer.encode_with_special(template.render(_as_messages(messages)))[0]
    except ValueError as error:
        raise InvalidRow(f"cannot be written as a conversation: {error}") from None


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
