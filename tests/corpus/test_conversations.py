"""Conversations in the forms that data sets have, and rows that are none."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from corpus.conversations import conversation_of, read_conversations
from corpus.documents import SkippedRows

PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": PAIR, "source": "x"}, PAIR),
        ({"prompt": "Hi", "completion": "Hello"}, PAIR),
        ({"prompt": [SYSTEM, PAIR[0]], "completion": [PAIR[1]]}, [SYSTEM, *PAIR]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, PAIR),
        ({"system": "Be brief.", "conversations": PAIR}, [SYSTEM, *PAIR]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, PAIR),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            [_ | {"content": c} for _, c in zip(PAIR, ("Add\n\n1 2", "3"), strict=True)],
        ),
    ],
)
def test_forms(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert conversation_of(row) == (messages, None)


def test_arguments_of_tool_calls_and_tools_as_strings_of_json() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [PAIR[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": '[{"name": "f"}]',
    }
    messages, tools = conversation_of(row)
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "Hi"}, "no conversation: it needs messages; .* but it has text"),
        ({"messages": []}, "'messages' is not a list of objects, or is empty"),
        ({"messages": PAIR[:1]}, "no message of the assistant"),
        ({"messages": [PAIR[0], {"role": "robot", "content": "?"}]}, "message 2 has the unknown role 'robot'"),
        ({"messages": [{"content": "Hi"}, PAIR[1]]}, "message 1 has no role"),
        ({"messages": [PAIR[0], PAIR[1] | {"tool_calls": 5}]}, "message 2: its tool_calls are int, not a list"),
        ({"messages": [{"role": "user"}, PAIR[1]]}, r"message 1 \(user\) has no content"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " \n"}]}, "message 2: the turn of the assistant is"),
        ({"messages": [PAIR[0], PAIR[1] | {"weight": -1}]}, "message 2: its weight -1 is not a number of 0 or more"),
        ({"messages": [PAIR[0] | {"weight": 1}, PAIR[1]]}, r"message 1 \(user\): only messages of the assistant"),
        ({"prompt": "Hi"}, "prompt without completion"),
        ({"prompt": 5, "completion": "Hi"}, "field 'prompt' is int, not a string or a list of messages"),
        ({"instruction": "Hi"}, "instruction without output"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no 'from' and 'value', only from"),
        ({"messages": [PAIR[0], PAIR[1] | {"content": "\ud83d"}]}, "half a surrogate pair"),
    ],
)  # fmt: skip
def test_rows_that_are_no_conversation(row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        conversation_of(row)


def test_bad_rows_are_counted_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    lines = [json.dumps({"messages": PAIR}), "{", json.dumps({"messages": PAIR[:1]}), "[]"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    skipped = SkippedRows()
    assert [c.where for c in read_conversations(str(path), skipped=skipped)] == ["line 1"]
    assert skipped.note("F").startswith("F: 3 rows skipped (an error with strict=true): line 2 is not valid JSON")
    assert skipped.note("F").endswith("line 3: no message of the assistant; line 4 is a JSON list, not an object")
    with pytest.raises(ValueError, match=r"chats\.jsonl\.gz line 2 is not valid JSON"):
        list(read_conversations(str(path), strict=True))
    path.write_bytes(gzip.compress(b"{}\n{}"))
    with pytest.raises(ValueError, match=r"line 1: no conversation.*; none of its 2 rows can be used"):
        list(read_conversations(str(path)))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [{"messages": PAIR}, {"messages": [PAIR[0], PAIR[1] | {"weight": 0.5}]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    read = list(read_conversations(str(tmp_path / "chats.parquet")))
    assert [c.messages for c in read] == [row["messages"] for row in rows]  # without the weight that is null
    assert [c.where for c in read] == ["row 1", "row 2"]
