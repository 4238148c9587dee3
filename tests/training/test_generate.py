"""Batches of continuations, text as it comes, files of prompts, router traces and conversations."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conf.commands import ChatConfig, GenerateConfig
from conf.schema import ParallelConfig
from corpus.tokenizer import Tokenizer
from launch import generate as command
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import ROOT, tiny_config, train, write_corpus
from training.prompts import ChatFormat, read_prompts
from training.text_stream import TextStream

LIMIT = 120.0


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    config = tiny_config(write_corpus(folder), folder / "run", steps=2)
    config.train.sequence_length, config.eval.sample_tokens = 64, 0
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    return folder / "run"


def generated(world: World, settings: GenerateConfig) -> int:
    return command.generate_rank(world, settings)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": "The cat sees a"}, {"prompt": "A"}]
    lines += [{"messages": [{"role": "user", "content": "The dog?"}]}, {"prompt": "The router drops the ball. The"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_text_does_not_depend_on_its_batch(ranks: RankPool, trained: Path, prompts: Path, tmp_path: Path) -> None:
    """Nor on the ranks; another sample, prompt or seed has other random numbers."""

    def texts(name: str, size: int = 1, **settings: Any) -> list[dict[str, Any]]:
        config = GenerateConfig(
            checkpoint=str(trained), prompts=str(prompts), samples=2, precision="fp32", max_tokens=9
        )
        for key, value in {"output": str(tmp_path / name), "temperature": 1.0, **settings}.items():
            setattr(config, key, value)
        assert ranks.run(size, generated, config, timeout=LIMIT) == [0] * size
        return rows(tmp_path / name)

    wanted = texts("wanted", batch_size=8)
    assert [(row["index"], row["sample"]) for row in wanted] == [(i, s) for i in range(4) for s in range(2)]
    assert "prompt" in wanted[0] and "messages" in wanted[4] and wanted[0]["text"] != wanted[1]["text"]
    assert texts("alone", batch_size=1) == texts("three", batch_size=3, top_k=320) == wanted
    assert texts("tp", size=2, parallel=ParallelConfig(tp=2)) == texts("dp", size=2, batch_size=3) == wanted
    assert texts("seed", seed=5) != wanted


def test_the_trace_has_every_token_once(ranks: RankPool, trained: Path, prompts: Path, tmp_path: Path) -> None:
    found = []
    for size, degrees, batch in ((1, {}, 4), (2, {"pp": 2}, 3), (2, {"ep": 2}, 3)):
        trace, output = (tmp_path / f"{name}{len(found)}" for name in ("trace", "output"))
        config = GenerateConfig(checkpoint=str(trained), prompts=str(prompts), max_tokens=5, precision="fp32")
        config.output, config.router_trace, config.temperature, config.batch_size = str(output), str(trace), 0.0, batch
        config.parallel = ParallelConfig(**degrees)
        assert ranks.run(size, generated, config, timeout=LIMIT) == [0] * size
        traced = {(row["index"], row["position"]): row for row in rows(trace)}
        assert len(traced) == len(rows(trace))
        # The last token that is generated is not read.
        lengths = {row["index"]: row["prompt_tokens"] + row["tokens"] - 1 for row in rows(output)}
        assert set(traced) == {(i, position) for i, length in lengths.items() for position in range(length)}
        assert all(list(row["layers"]) == ["1"] for row in traced.values())
        found.append(traced)
    for other in found[1:]:
        for key, row in other.items():
            one, two = row["layers"]["1"], found[0][key]["layers"]["1"]
            assert one["experts"] == two["experts"] and one["weights"] == pytest.approx(two["weights"], rel=1e-4)


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Tokenizer:
    return Tokenizer.load(str(trained / "tokenizer.json"), "<|endoftext|>")


def test_text_comes_by_whole_characters_and_ends_before_a_stop_string(tokenizer: Tokenizer) -> None:
    text = "The cät sées 漢字. STOP it"
    for stop, wanted in (((), text), (("STOP",), "The cät sées 漢字. "), (("字", "."), "The cät sées 漢")):
        stream, pieces = TextStream(tokenizer, tokenizer.encode("A dog. "), stop), []
        for token in tokenizer.encode(text):
            pieces.append(stream.push(token))
            assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1] and not any(s in "".join(pieces) for s in stop)
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == wanted and stream.stopped == bool(stop)
    held = TextStream(tokenizer, [], ("never",))
    assert "".join(map(held.push, tokenizer.encode("a nev"))) == "a " and held.finish() == "nev"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "x", "are read from .txt"),
        ("a.txt", "\n\n", "has no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 needs either prompt"),
        ("b.jsonl", "{", "line 1 is not JSON"),
        ("c.jsonl", '{"messages": [{"content": "a"}]}', "c.jsonl, line 1: message 1 has no role"),
        ("c.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}', "message 1 has the unknown role 'robot'"),
        ("c.jsonl", '{"messages": [{"role": "user"}]}', r"line 1: message 1 \(user\) has no content"),
        ("c.jsonl", '{"messages": ["a"]}', "needs a role and its content"),
        ("c.jsonl", '{"prompt": "\\ud800"}', "line 1: its text has half a surrogate pair"),
        ("c.jsonl", "[" * 5000, "line 1 is not JSON"),
    ],
)
def test_a_file_that_has_no_prompts_is_named(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(str(tmp_path / name))


def test_a_template_that_leaves_answers_out_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"chat_template.jinja does not write what the assistant says"):
        ChatFormat(tokenizer, tmp_path).end_ids()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"parallel": ParallelConfig(cp=2)}, r"parallel.cp=2 cannot generate text: cp shards"),
        ({"parallel": ParallelConfig(tp=2, sequence_parallel=True)}, "sequence_parallel"),
        ({"prompt": "a", "prompts": "b.txt"}, "both set"),
        ({"stop": [""]}, "empty string"),
        ({"samples": 0}, "samples=0 must be >= 1"),
        ({"prompts": "nowhere.txt"}, "does not exist"),
        ({"prompt": "a\udcff"}, "prompt is not text in UTF-8"),
        ({"prompt": "a", "output": "/nowhere/out.jsonl"}, "output=.*: there is no folder /nowhere"),
        ({"prompt": "a", "output": "new.jsonl", "router_trace": "new.jsonl"}, "output and router_trace are both new"),
    ],
)
def test_settings_that_cannot_be_served(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        command.main(GenerateConfig(checkpoint="x", **settings))


def test_a_conversation(trained: Path) -> None:
    """Through a pipe: the same after /reset as at the beginning, another with a system message; and the same on two
    simulated ranks, whose terminal is that of the process that started them."""
    lines = "The cat\n\nmore\n/reset\nThe cat\n/system The router drops\nThe cat\n/nothing\n"
    words = [f"checkpoint={trained}", "precision=fp32", "temperature=0", "max_tokens=5"]
    command_line, outputs = [sys.executable, "-m", "launch.chat", *words], []
    for more, ranks in (([], {}), (["parallel.ep=2"], {"NPROC": "2"})):
        found = subprocess.run(
            [*command_line, *more],
            cwd=ROOT,
            input=lines,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=os.environ | ranks,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        outputs.append(found.stdout)
    assert outputs[0] == outputs[1]
    first, second, reset, again, system, third, told = outputs[0].splitlines()
    assert first == again and reset == "a new conversation" and "system message" in system
    assert first.endswith("[max_tokens reached]") and second and third and told.startswith("no command /nothing")


def talk(world: World, run: str) -> list[Any]:
    """Answers with the cache of earlier turns, and what a new one gives after the same messages."""
    from conf.commands import InferenceConfig
    from training.chat import Conversation
    from training.generate import Sampling
    from training.load_checkpoint import load_model

    with load_model(run, InferenceConfig(precision="fp32"), world) as loaded:
        one, two = (Conversation(loaded.built, loaded.tokenizer, loaded.run_dir, Sampling(4)) for _ in range(2))
        reads: list[int] = []
        start_over = one.cached.start
        one.cached.start = lambda contexts: reads.append(len(contexts[0])) or start_over(contexts)
        first = "".join(one.answer("A"))
        two.messages, two.turn, two.seen = one.messages, one.turn, one.seen
        second, again = ("".join(conversation.answer("b")) for conversation in (one, two))
        pieces = one.answer("c")
        next(pieces)
        pieces.close()
        return [first, second, again, reads, one.messages[-1]["role"], one.finish_reason]


def test_a_turn_reads_only_what_is_new(ranks: RankPool, trained: Path) -> None:
    """The third one no longer fits, and is read anew."""
    ((first, second, again, reads, last, reason),) = ranks.run(1, talk, str(trained), timeout=LIMIT)
    assert first and second == again and len(reads) == 2
    assert last == "assistant" and reason is None


class Impatient:
    """Who stops an answer after three tokens."""

    is_terminal = False

    def __init__(self) -> None:
        self.lines = ["The cat", "The dog"]

    def line(self) -> str | None:
        return self.lines.pop(0) if self.lines else None

    @contextlib.contextmanager
    def may_stop(self) -> Iterator[Callable[[], bool]]:
        asked = itertools.count(1)
        yield lambda: next(asked) == 3


def stopped_answers(world: World, config: ChatConfig) -> list[str]:
    """What a rank prints (rank function)."""
    from launch import chat

    printed: list[str] = []
    with mock.patch.object(chat, "print", lambda text, end="\n", **_: printed.append(text + end), create=True):
        assert chat.chat_rank(world, config, Impatient()) == 0
    return "".join(printed).splitlines()


def test_all_ranks_stop_an_answer_at_the_same_token(ranks: RankPool, trained: Path) -> None:
    config = ChatConfig(checkpoint=str(trained), precision="fp32", temperature=0.0, max_tokens=20)
    (wanted,) = ranks.run(1, stopped_answers, config, timeout=LIMIT)
    assert len(wanted) == 2 and all(line.endswith(" [stopped]") for line in wanted)
    config.parallel = ParallelConfig(pp=2)
    assert ranks.run(2, stopped_answers, config, timeout=LIMIT) == [wanted, []]


@pytest.mark.parametrize(("hidden", "width"), [(6, 5), (8, 4)])
def test_few_rows_of_experts_equal_the_loop(hidden: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One grouped product where more than half of the experts have rows, if the sizes are aligned; else one each."""
    from ops import experts

    grouped = []
    monkeypatch.setattr(
        experts,
        "torch_grouped_product",
        lambda *given, of=experts.torch_grouped_product: grouped.append(1) or of(*given),
    )
    draw, sizes = (
        torch.Generator().manual_seed(0),
        ((7, hidden), (4, hidden, 2, width), (4, width, hidden), (4, 2, width)),
    )
    x, w_in, w_out, b_in = (torch.randn(*size, generator=draw) for size in sizes)
    for counts in ([0, 3, 0, 4], [7, 0, 0, 0], [0, 2, 4, 1], [1, 2, 3, 1]):
        arguments = (x, counts, w_in, w_out, "swiglu", b_in)
        grouped.clear()
        with torch.no_grad():
            torch.testing.assert_close(
                experts.fused_experts(*arguments), experts.loop_experts(*arguments), rtol=1e-5, atol=1e-6
            )
        assert len(grouped) == (2 if hidden == 8 and counts.count(0) < 2 else 0)
