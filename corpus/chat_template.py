"""Chat templates: a conversation as text, and as token ids with a loss weight per token.

A template is Jinja, as Transformers' tokenizers have it, and runs in a sandbox with the same functions.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.schema import DataConfig
from corpus.paths import nearest_existing
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import CHAT_TEMPLATE, COMPANION_DIR, TOKENIZER, companions

Message = Mapping[str, Any]
"""A role, its content, and what else the template reads (tool_calls, reasoning_content, ...); `weight` is the factor
of the loss on an assistant's message, 1 by default."""
Span = tuple[int, int]
"""First character and end of a part of a rendered conversation."""

DEFAULT_TEMPLATE = """\
{%- macro said(message) %}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content or [] %}
{{- part.text }}
{%- endfor %}
{%- endif %}
{%- if message.tool_calls %}
{{- message.tool_calls | tojson }}
{%- endif %}
{%- endmacro %}
{%- if tools %}
{{- 'Tools:\\n' ~ tools | tojson ~ '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception("the default template has no role '" ~ message.role ~ "'") }}
{%- endif %}
{{- message.role | capitalize ~ ':\\n' }}
{%- if message.role == 'assistant' %}
{%- if not said(message) | trim %}
{{- raise_exception("the default template writes no reasoning, and a turn of the assistant has nothing else") }}
{%- endif %}
{%- generation %}
{{- said(message) ~ eos_token }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- said(message) ~ '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:\\n' }}
{%- endif %}
"""
"""The template where the tokenizer has none. It needs no special token except the one that ends a document, which also
ends an assistant's turn."""
DEFAULT_NAME = "the default template"

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """How a conversation is written for a model."""

    def __init__(
        self,
        source: str,
        name: str = "the template",
        special_tokens: Mapping[str, str] | None = None,
        tool_source: str | None = None,
    ) -> None:
        """
        Args:
            source: Jinja.
            name: of the template in messages, such as the path of its file.
            special_tokens: variables of the template: bos_token, eos_token, ...
            tool_source: the template of conversations with tools. None: the same.

        Raises:
            ValueError: not a valid template.
        """
        self.source, self.name, self.tool_source = source, name, tool_source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._compiled = {text: _environment().from_string(text) for text in (source, tool_source or source)}
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name} is not a valid chat template: {error.message}, line {error.lineno}") from None

    @classmethod
    def of(cls, tokenizer: str | Path | None, eod_token: str = "<|endoftext|>") -> "ChatTemplate":
        """The template of a tokenizer, or the default one if it has none.

        Args:
            tokenizer: a directory as `save_pretrained` writes it, a run directory, or a tokenizer.json in one of these.
            eod_token: eos_token for the template where the directory names none.

        Raises:
            ValueError: a file that cannot be read, or a template that is not valid.
        """
        folder = None if tokenizer is None else Path(tokenizer).expanduser()
        if folder is not None and folder.is_dir() and folder.name != COMPANION_DIR:
            folder = folder / TOKENIZER
        elif folder is not None and folder.is_dir():
            folder = folder.parent / TOKENIZER
        files = {path.name: path for path in (companions(folder) if folder is not None else [])}
        config = _read_json(files.get("tokenizer_config.json"))
        special = {"eos_token": eod_token, **_special_tokens(_read_json(files.get("special_tokens_map.json")))}
        special |= _special_tokens(config)
        if jinja := files.get(CHAT_TEMPLATE):
            return cls(_read(jinja), str(jinja), special)
        if not config.get("chat_template"):
            return cls(DEFAULT_TEMPLATE, DEFAULT_NAME, special)
        source, tool_source = _named(config["chat_template"], files["tokenizer_config.json"])
        return cls(source, str(files["tokenizer_config.json"]), special, tool_source)

    @classmethod
    def of_data(cls, data: DataConfig, tokenizer: str) -> "ChatTemplate":
        """The template of data.chat_template, or else of the tokenizer. Raises ValueError as `of`."""
        of_tokenizer = cls.of(tokenizer, data.eod_token)
        if data.chat_template is None:
            return of_tokenizer
        path = Path(data.chat_template).expanduser()
        if not path.exists():
            raise ValueError(f"data.chat_template={path} does not exist{nearest_existing(str(path))}")
        return cls(_read(path), str(path), of_tokenizer.special_tokens)

    def identity(self) -> list[Any]:
        """Everything that the rendered text depends on, JSON-serialisable."""
        return [self.source, self.tool_source, sorted(self.special_tokens.items())]

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: end with what comes before an assistant's message.
            tools: JSON schemas of the functions that the assistant may call.

        Raises:
            ValueError: the template refuses the conversation; the message names the template.
        """
        return self._render(messages, add_generation_prompt, tools)[0]

    def assistant_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[tuple[Span, float]]]:
        """The text of a conversation, and the spans in it that the assistant generates, each with its weight: the
        `{% generation %}` blocks of a template that has them; otherwise what a message adds to the conversation before
        it and its generation prompt.

        Raises:
            ValueError: as `render`; or the template has no `{% generation %}` and writes a message differently when
                others follow, so that the spans cannot be found.
        """
        text, blocks = self._render(messages, False, tools)
        replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        weights = [_weight(messages[i]) for i in replies]
        if not self.marks_assistant(tools):
            return text, [(self._span(messages, i, text, tools), w) for i, w in zip(replies, weights, strict=True)]
        if len(blocks) == len(replies):
            return text, list(zip(blocks, weights, strict=True))
        if len(set(weights)) > 1:
            raise ValueError(
                f"{self.name} has {len(blocks)} generation blocks for {len(replies)} messages of the assistant: "
                "messages cannot have different weights"
            )
        return text, [(block, weights[0] if weights else 1.0) for block in blocks]

    def _span(self, messages: Sequence[Message], i: int, text: str, tools: Sequence[Mapping[str, Any]] | None) -> Span:
        before = self.render(messages[:i], True, tools)
        after = text if i == len(messages) - 1 else self.render(messages[: i + 1], False, tools)
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        if after.startswith(before):
            what = f"message {i + 1} differently when others follow"
        else:
            what = f"message {i + 1} without its generation prompt, or the messages before it differently"
        raise ValueError(
            f"{self.name} writes {what}: the assistant's tokens cannot be found; "
            "mark them in the template with {% generation %} ... {% endgeneration %}"
        )

    def marks_assistant(self, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return bool(_GENERATION.search(self._source(tools)))

    def _source(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self.tool_source if tools and self.tool_source else self.source

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of its generation blocks."""
        compiled = self._compiled[self._source(tools)]
        blocks: list[str] = []
        spans: list[Span] = []
        plain = [{k: v for k, v in m.items() if v is not None and k != "weight"} for m in messages]
        values = {"messages": plain, "tools": list(tools) if tools else None, "documents": None}
        try:
            with compiled.environment.extensions[_GenerationBlocks.identifier].recording(blocks, spans):
                for block in compiled.generate(
                    **self.special_tokens, **values, add_generation_prompt=add_generation_prompt
                ):
                    blocks.append(block)
        except Exception as error:  # a template can raise whatever Python raises
            raise ValueError(f"{self.name}: {error}") from None
        return "".join(blocks), spans


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[float]]:
    """Token ids of a conversation, special tokens parsed, and the loss weight of each as a target: that of its message
    where the assistant generates it, including the token that ends the turn, and 0 elsewhere.

    Raises:
        ValueError: as `ChatTemplate.assistant_spans`.
    """
    text, spans = template.assistant_spans(messages, tools)
    ids, offsets = tokenizer.encode_with_special(text)
    weights = [0.0] * len(ids)
    for (begin, end), weight in spans:
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
        if not template.marks_assistant(tools):
            inside = _until_end_of_turn(inside, ids, text, offsets, tokenizer)
        for i in inside:
            weights[i] = weight
    return ids, weights


def _until_end_of_turn(
    inside: list[int], ids: list[int], text: str, offsets: list[Span], tokenizer: Tokenizer
) -> list[int]:
    """Without the whitespace that a template writes after the special token that ends a turn: generation has stopped
    there."""
    kept = len(inside)
    while kept and not text[slice(*offsets[inside[kept - 1]])].strip():
        kept -= 1
    return inside[:kept] if kept and tokenizer.is_special(ids[inside[kept - 1]]) else inside


def _weight(message: Message) -> float:
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant generates, as in Transformers."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._before: list[str] = []
        self._spans: list[Span] = []

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Any) -> str:
        text = caller()
        begin = sum(map(len, self._before))
        self._spans.append((begin, begin + len(text)))
        return text

    @contextmanager
    def recording(self, before: list[str], spans: list[Span]) -> Iterator[None]:
        """
        Args:
            before: the text that was rendered so far, to which the caller appends.
            spans: receives the spans of the blocks.
        """
        self._before, self._spans = before, spans
        try:
            yield
        finally:
            self._before, self._spans = [], []


def _environment() -> jinja2.Environment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes the characters of HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a file names, as strings or as objects with their content."""
    given = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name)}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in given.items()}


def _named(given: Any, path: Path) -> tuple[str, str | None]:
    """The default template and the one with tools, of a string or a list of named ones."""
    if isinstance(given, str):
        return given, None
    try:
        by_name = {entry["name"]: entry["template"] for entry in given}
        return by_name["default"], by_name.get("tool_use")
    except (TypeError, KeyError):
        raise ValueError(f"{path}: chat_template is neither a string nor a list with one named 'default'") from None
