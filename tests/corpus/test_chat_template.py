"""Chat templates against Transformers' apply_chat_template, and the loss weights of a conversation's tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from corpus.chat_template import DEFAULT_TEMPLATE, ChatTemplate, encode_chat
from corpus.tokenizer import Tokenizer

# In the form of those published with the models.
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.function.name ~ '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "tools": TOOLS, "default": DEFAULT_TEMPLATE}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 2 + 2? <b>\n"},
    {"role": "assistant", "content": "2 + 2 é 4."},
    {"role": "user", "content": "And\n3 + 3?"},
    {"role": "assistant", "content": "It is 6 😀 today."},
]
CALLS: list[dict[str, Any]] = [
    {"role": "system", "content": "Use the tools."},
    {"role": "user", "content": "Weather in Köln?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]},
    {"role": "tool", "content": '{"degrees": 12}'},
    {"role": "assistant", "content": "12 degrees."},
]
TOOL_LIST = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of Transformers with the special tokens of the templates."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["What is the weather? It is 12 degrees today. " * 20, json.dumps(TOOL_LIST) * 20]
    Tokenizer.train(texts, vocab_size=320, eod_token="<|endoftext|>").save(str(folder / "made.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "made.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return tokenizer


def saved(theirs: Any, folder: Path, template: str) -> tuple[ChatTemplate, Tokenizer]:
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return ChatTemplate.of(folder), Tokenizer.load(str(folder / "tokenizer.json"), None)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_and_tokens_are_those_of_transformers(theirs: Any, tmp_path: Path, name: str, prompt: bool) -> None:
    template, tokenizer = saved(theirs, tmp_path, TEMPLATES[name])
    chats = [(CHAT, None), (CALLS, TOOL_LIST)] if name in ("tools", "default") else [(CHAT, None)]
    for messages, tools in chats:
        given = CHAT[:3] if prompt and messages is CHAT else messages
        want = theirs.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert template.render(given, prompt, tools) == want
        ids = theirs.apply_chat_template(given, tools=tools, add_generation_prompt=prompt)["input_ids"]
        assert tokenizer.encode_with_special(want)[0] == ids


@pytest.mark.parametrize("name", ["tools", "default"])
def test_generation_blocks_are_the_assistants_tokens(theirs: Any, tmp_path: Path, name: str) -> None:
    template, tokenizer = saved(theirs, tmp_path, TEMPLATES[name])
    for messages, tools in [(CHAT, None), (CALLS, TOOL_LIST)]:
        want = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids, weights = encode_chat(template, tokenizer, messages, tools)
        assert (ids, weights) == (want["input_ids"], [float(m) for m in want["assistant_masks"]])
        assert 0 < sum(weights) < len(weights)


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("chatml", ["2 + 2 é 4.<|im_end|>", "It is 6 😀 today.<|im_end|>"]),
        ("llama3", ["2 + 2 é 4.<|eot_id|>", "It is 6 😀 today.<|eot_id|>"]),
        ("mistral", ["2 + 2 é 4.</s>", "It is 6 😀 today.</s>"]),
        ("default", ["2 + 2 é 4.</s>", "It is 6 😀 today.</s>"]),
    ],
)
def test_the_end_of_the_turn_counts_and_nothing_after_it(
    theirs: Any, tmp_path: Path, name: str, turns: list[str]
) -> None:
    template, tokenizer = saved(theirs, tmp_path, TEMPLATES[name])
    assert _weighted(tokenizer, *encode_chat(template, tokenizer, CHAT)) == [(turn, 1.0) for turn in turns]


@pytest.mark.parametrize("name", ["chatml", "tools"])
def test_weights_of_messages(theirs: Any, tmp_path: Path, name: str) -> None:
    template, tokenizer = saved(theirs, tmp_path, TEMPLATES[name])
    weighted = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 0.25}]
    ids, weights = encode_chat(template, tokenizer, weighted)
    assert ids == encode_chat(template, tokenizer, CHAT)[0]
    assert _weighted(tokenizer, ids, weights) == [("It is 6 😀 today.<|im_end|>", 0.25)]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    shortens = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(shortens)
    template = ChatTemplate.of(tmp_path)
    with pytest.raises(
        ValueError, match=r"chat_template.jinja writes message 2 differently when others follow.*{% gen"
    ):
        template.assistant_spans(CHAT)
    assert template.assistant_spans(CHAT[:2])[1] == [((len(CHAT[0]["content"]), 29), 1.0)]


def test_errors_name_the_template(theirs: Any, tmp_path: Path) -> None:
    template, _ = saved(theirs, tmp_path, MISTRAL)
    with pytest.raises(ValueError, match=r"chat_template.jinja: Conversation roles must alternate"):
        template.render(CHAT[1:])
    with pytest.raises(ValueError, match=r"the default template: .* no role 'robot'"):
        ChatTemplate.of(None).render([{"role": "robot", "content": ""}])
    with pytest.raises(ValueError, match=r"is not a valid chat template: .*, line 2"):
        ChatTemplate("\n{% for %}", "mine")
    with pytest.raises(ValueError, match=r"mine: .*unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", "mine").render(CHAT)


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    (tmp_path / "tokenizer.json").write_text("{}")
    config = {"chat_template": named, "eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of(tmp_path)
    assert (template.render(CHAT), template.render(CHAT, tools=TOOL_LIST)) == ("plain", "1")
    assert template.special_tokens["eos_token"] == "<end>"
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    default = ChatTemplate.of(tmp_path / "tokenizer.json")
    want = "User:\nWhat is 2 + 2? <b>\n\nAssistant:\n2 + 2 é 4.<end>\nAssistant:\n"
    assert default.render(CHAT[:2], add_generation_prompt=True) == want


def test_the_default_template_writes_all_that_is_said() -> None:
    """Also calls of tools, the tools, and content in parts."""
    parts = {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Köln?"}]}
    text, spans = ChatTemplate.of(None, "<end>").assistant_spans([CALLS[0], parts, *CALLS[2:]], TOOL_LIST)
    call = '[{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]'
    assert text == (
        f"Tools:\n{json.dumps(TOOL_LIST)}\nSystem:\nUse the tools.\nUser:\nWeather in Köln?\nAssistant:\n{call}<end>\n"
        'Tool:\n{"degrees": 12}\nAssistant:\n12 degrees.<end>\n'
    )
    assert [text[slice(*span)] for span, _ in spans] == [f"{call}<end>", "12 degrees.<end>"]
    with pytest.raises(ValueError, match=r"the default template writes no reasoning, and a turn"):
        ChatTemplate.of(None).render([parts, {"role": "assistant", "reasoning_content": "Hm."}])


def _weighted(tokenizer: Tokenizer, ids: list[int], weights: list[float]) -> list[tuple[str, float]]:
    """The runs of tokens with a weight, decoded."""
    runs: list[tuple[list[int], float]] = []
    for i, (token, weight) in enumerate(zip(ids, weights, strict=True)):
        if weight and (i == 0 or weights[i - 1] != weight):
            runs.append(([], weight))
        if weight:
            runs[-1][0].append(token)
    return [(tokenizer.decode(run), weight) for run, weight in runs]
