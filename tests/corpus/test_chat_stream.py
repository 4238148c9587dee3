"""Conversations as samples: their tokens, labels and weights, how they are packed, and what is cached."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import DataConfig
from corpus.chat_stream import ChatStream, ChatWindows, describe_example
from corpus.chat_template import ChatTemplate, encode_chat
from corpus.example_chat import conversations
from corpus.prepare import Prepared, prepare
from corpus.tokenizer import Tokenizer

SIZE, VOCABULARY = 96, 400


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, rows: list[dict[str, Any]], **others: Any) -> DataConfig:
    files = [str(write_rows(folder / "chats.jsonl", rows))]
    data = DataConfig(kind="chat", files=files, cache_dir=str(folder / "cache"), document_mask=True, valid_fraction=0.2)
    return replace(data, **others)


def prepared_of(data: DataConfig) -> Prepared:
    return prepare(data, vocab_size=VOCABULARY, sequence_length=SIZE)


def stream_of(data: DataConfig, seed: int = 1, **others: Any) -> ChatStream:
    return ChatStream(prepared_of(data).train[0], data, sequence_length=SIZE, seed=[seed], **others)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    rows = conversations(60)
    rows[0]["messages"][1] |= {"weight": 0.25}
    return settings(tmp_path_factory.mktemp("chat"), rows)


def parts_of(sample: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """The token ids and weights of each conversation of a sample, as encode_chat gives them."""
    starts = [*(sample["positions"] == 0).nonzero().flatten().tolist(), SIZE]
    parts = []
    for begin, end in pairwise(starts):
        if sample["padding"][begin]:
            assert sample["padding"][begin:].all() and not sample["loss_mask"][begin:].any()
            break
        assert sample["positions"][begin:end].tolist() == list(range(end - begin))
        tokens, labels = sample["tokens"][begin:end].tolist(), sample["labels"][begin:end].tolist()
        assert tokens[1:] == labels[:-1]
        parts.append(((tokens[0], *labels), (0.0, *sample["loss_mask"][begin:end].tolist())))
    assert not sample["padding"][: sum(len(ids) - 1 for ids, _ in parts)].any()
    return parts


def encoded(data: DataConfig) -> set[tuple[tuple[int, ...], tuple[float, ...]]]:
    """What samples should have of the file's conversations, truncated to SIZE places."""
    tokenizer = Tokenizer.load(str(prepared_of(data).tokenizer), data.eod_token)
    rows = [json.loads(line)["messages"] for line in Path(data.files[0]).read_text().splitlines()]
    found = set()
    for messages in rows:
        ids, weights = encode_chat(ChatTemplate.of(None), tokenizer, messages)
        ids, weights = ids[: SIZE + 1], weights[: SIZE + 1]
        if any(weights[1:]):
            found.add((tuple(ids), (0.0, *weights[1:])))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_each_conversation_is_in_an_epoch_once(data: DataConfig, packing: bool) -> None:
    data = replace(data, packing=packing)
    notes: list[str] = []
    stream, windows = (
        stream_of(data, note=notes.append),
        ChatWindows(prepared_of(data).valid[0], data, sequence_length=SIZE),
    )
    count = int(notes[0].split(" sequences")[0].split()[-1])
    train = [part for i in range(count) for part in parts_of(stream.sample(i))]
    held_out = [part for i in range(len(windows)) for part in parts_of(windows.sample(i))]
    assert len(train) == int(notes[0].split()[0]) and len(held_out) >= 5
    assert {*train, *held_out} == encoded(data) and not {*train} & {*held_out}
    assert (count < len(train)) == packing
    assert 0.25 in {weight for _, weights in [*train, *held_out] for weight in weights}
    # The next epoch has the same ones in another order.
    again = [part for i in range(count, 2 * count + 5) for part in parts_of(stream.sample(i))]
    assert set(again) == set(train) and again[:10] != train[:10]


def test_sample_i_depends_on_nothing_but_data_and_seed(data: DataConfig) -> None:
    stream = stream_of(data)
    samples = {i: stream.sample(i) for i in (0, 3, 40, 70)}
    for i in (70, 3):
        other = stream_of(data).sample(i)  # as a run that resumes there
        assert all(torch.equal(other[name], value) for name, value in samples[i].items())
    cold = replace(data, cache_dir=data.cache_dir + "2")
    assert torch.equal(stream_of(cold).sample(40)["tokens"], samples[40]["tokens"])
    assert not torch.equal(stream_of(data, seed=2).sample(0)["tokens"], samples[0]["tokens"])


def test_past_the_held_out_conversations_is_padding(data: DataConfig) -> None:
    windows = ChatWindows(prepared_of(data).valid[0], data, sequence_length=SIZE)
    past = windows.sample(len(windows))
    assert past["padding"].all() and not past["loss_mask"].any() and past["positions"].tolist() == list(range(SIZE))


def test_too_long_conversations(data: DataConfig) -> None:
    notes: list[str] = []
    for too_long in ("truncate", "drop"):
        stream_of(replace(data, too_long=too_long), note=notes.append)
    truncated = int(notes[0].split("; ")[1].split()[0])
    assert notes[0].endswith("too long: truncated") and truncated > 0
    assert notes[1].endswith(f"; {truncated} too long: left out")
    with pytest.raises(
        ValueError, match=r"every conversation .* is too long for train.sequence_length=4; the shortest"
    ):
        ChatStream(prepared_of(data).train[0], replace(data, too_long="drop"), sequence_length=4, seed=[1])


def test_refused_conversations_are_counted_or_an_error(tmp_path: Path) -> None:
    refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    says = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "template.jinja").write_text(refuses + says)
    rows = conversations(12)
    rows[3]["messages"].insert(0, {"role": "assistant", "content": "Hi"})
    data = settings(tmp_path, rows, chat_template=str(tmp_path / "template.jinja"))
    (note,) = prepared_of(data).notes
    assert note.endswith(
        "1 row skipped (an error with strict=true): " + f"line 4: {tmp_path}/template.jinja: user first"
    )
    with pytest.raises(ValueError, match=r"chats.jsonl line 4: .*template.jinja: user first"):
        prepared_of(replace(data, strict=True))


@pytest.mark.parametrize(
    ("template", "weight", "why"),
    [
        ("{{ raise_exception('not today') }}", 1, r"\S*template\.jinja: not today"),
        ("{{ messages[0].content }}", 1, r"\S*template\.jinja writes nothing of what the assistant says"),
        (None, 0, "every message of the assistant has weight 0"),
    ],
)
def test_a_file_of_which_no_conversation_can_be_used(
    template: str | None, weight: float, why: str, tmp_path: Path
) -> None:
    rows = conversations(3)
    for message in (message for row in rows for message in row["messages"] if message["role"] == "assistant"):
        message["weight"] = weight
    data = settings(tmp_path, rows)
    if template is not None:
        (tmp_path / "template.jinja").write_text(template)
        data = replace(data, chat_template=str(tmp_path / "template.jinja"))
    with pytest.raises(ValueError, match=rf"^\S*chats\.jsonl line 1: {why}.*; none of its 3 rows can be used$"):
        prepared_of(data)
    more = str(write_rows(tmp_path / "more.jsonl", conversations(12)))
    if template is None:
        (note,) = prepared_of(replace(data, files=[*data.files, more])).notes
        assert note.endswith(f"{why}; none of its 3 rows can be used: left out (an error with strict=true)")


def test_a_chat_template_that_is_not_there(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").mkdir()
    with pytest.raises(
        ValueError, match=r"^data.chat_template=\S*templat.jinja does not exist; did you mean \S*e.jinja"
    ):
        prepared_of(replace(data, chat_template=str(tmp_path / "templat.jinja")))
    with pytest.raises(ValueError, match=r"template.jinja cannot be read: Is a directory$"):
        prepared_of(replace(data, chat_template=str(tmp_path / "template.jinja")))


def test_other_templates_and_weights_are_other_data(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    rows = conversations(12)
    plain = settings(tmp_path, rows)
    keys = [prepared_of(plain).key, prepared_of(plain).key]
    keys.append(prepared_of(replace(plain, chat_template=str(tmp_path / "template.jinja"))).key)
    for row in rows:
        row["messages"][1]["weight"] = 0.5
    keys.append(prepared_of(settings(tmp_path, rows)).key)
    assert keys[0] == keys[1] and len({*keys}) == 3


def test_the_example_shows_what_is_trained_on(data: DataConfig) -> None:
    tokenizer = Tokenizer.load(str(prepared_of(data).tokenizer), data.eod_token)
    stream = stream_of(data)
    ((ids, weights), *_) = parts_of(stream.sample(0))
    text = describe_example(stream.sample(0), tokenizer)
    shown = text.partition("\n")[2]
    assert shown.startswith("[[User:\n") and shown.replace("[[", "").replace("]]", "") == tokenizer.decode(list(ids))
    outside = "".join(part.rpartition("]]")[2] for part in shown.split("[["))
    assert outside == tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w])
