"""launch.data inspect: what it counts, on files made by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conf.inspect_data_config import InspectDataConfig
from corpus.inspection import text, tokens
from corpus.inspection.report import size_text
from corpus.tokenizer import Tokenizer
from launch.data import arguments, histogram, main
from tests.corpus.bucket import Bucket
from tests.corpus.helpers import write_pair


def shown(capsys: pytest.CaptureFixture[str], path: object, **settings: object) -> str:
    assert main(InspectDataConfig(path=path, **settings)) == 0
    return capsys.readouterr().out


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ['{"text": "one two", "id": 1, "meta": {"url": "u"}}', '{"text": null}', '{"text": ""}', "{", '{"text": "']
    content = "\n".join(rows[:4]).encode() + b'\n{"text": "three\xff"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content)[:12])
    (tmp_path / "c.txt").write_text("x" * 1000)
    found = shown(capsys, f"{tmp_path}/*", samples=9)
    for line in (
        f"files       3 (jsonl 2, text 1), {size_text(sum(path.stat().st_size for path in tmp_path.iterdir()))}",
        "documents   3",
        "characters  1,013",
        "fields      text (str), id (int), meta (dict)",
        "characters of a document: median 7, mean 338, longest 1,000",
        f"{tmp_path}/a.jsonl.gz, document 3:\n  three\\ufffd".encode().decode("unicode_escape"),
        f"problem: 2 x row without text: {tmp_path}/a.jsonl.gz line 2: field 'text' is null, not a string; "
        f"{tmp_path}/a.jsonl.gz line 4 is not valid JSON: Expecting property name enclosed in double quotes, column 2",
        f"problem: 1 x invalid UTF-8, replaced by U+FFFD: {tmp_path}/a.jsonl.gz, line 5",
        f"problem: 1 x empty document, left out: {tmp_path}/a.jsonl.gz, document 2",
        f"problem: 1 x file that cannot be read to its end: {tmp_path}/b.jsonl.gz is damaged after line 0: it ends in",
    ):
        assert line in found
    assert "sample:" not in found
    with pytest.raises(ValueError, match=r"5 problems \(strict=true\)"):
        main(InspectDataConfig(path=f"{tmp_path}/*", strict=True))
    capsys.readouterr()
    with pytest.raises(ValueError, match="has no document that can be used"):
        main(InspectDataConfig(path=f"{tmp_path}/b.jsonl.gz"))
    assert "problem: 1 x file that cannot be read" in capsys.readouterr().out


def test_a_sample_estimates_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"{i} " + "word " * (i % 50)}) for i in range(20_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(text, "SAMPLE_DOCUMENTS", 100)
    found = shown(capsys, str(tmp_path / "a.jsonl"))
    assert "a sample: the beginning of 1 of 1 files, " in found and "full=true reads everything" in found
    assert "documents   about 20,000\n" in found
    assert "documents   20,000\n" in shown(capsys, str(tmp_path / "a.jsonl"), full=True)


def test_of_a_huge_file_of_text_the_beginning_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("words " * 500_000)
    monkeypatch.setattr(text, "SAMPLE_CHARACTERS", 1_000_000)
    found = shown(capsys, str(tmp_path / "a.txt"))
    assert "a sample: the beginning of 1 of 1 files, 1 documents" in found and "longest 1,000,000\n" in found
    (tmp_path / "é.txt").write_text("é" * 700_000)
    found = shown(capsys, str(tmp_path / "é.txt"))
    assert "longest 500,000\n" in found and "no problems found" in found
    (tmp_path / "é.txt").write_text("1" + "é" * 700_000)
    assert "no problems found" in shown(capsys, str(tmp_path / "é.txt"))
    assert "longest 3,000,000\n" in shown(capsys, str(tmp_path / "a.txt"), full=True)


def test_conversations_and_preferences_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": []}))
    found = shown(capsys, str(tmp_path / "chat.jsonl"))
    assert "kind        conversations (data=chat)" in found and "  user: why?\n  assistant: because\n" in found
    assert "1 x row without text" in found and "line 2: field 'messages' is not a list of objects, or is empty" in found
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a?", "chosen": " yes", "rejected": " no"}))
    found = shown(capsys, str(tmp_path / "pairs.jsonl"))
    assert "preferences (data=preference)" in found and "  a?\n  ---\n   yes\n" in found


def test_source_code_by_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.py", "b.py", "c.rs"):
        (tmp_path / name).write_text(name)
    assert "languages   Python 2, Rust 1\n" in shown(capsys, str(tmp_path))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, Tokenizer]:
    """Ten documents, of which one is empty, two lack their end, and one has an id that the tokenizer does not have."""
    tokenizer = Tokenizer.train(["some words"], vocab_size=265, eod_token="<|endoftext|>")
    tokenizer.save(str(tmp_path / "p.tokenizer.json"))
    documents = [[*tokenizer.encode(f"document {i}"), tokenizer.eod_id or 0] for i in range(10)]
    documents[3], documents[5], documents[7] = [], documents[5][:-1], [999]
    return write_pair(tmp_path / "p", documents), tokenizer


@pytest.mark.parametrize("full", [False, True])
def test_token_files(pair: tuple[str, Tokenizer], capsys: pytest.CaptureFixture[str], full: bool) -> None:
    prefix, tokenizer = pair
    for path in (prefix, f"{prefix}.bin"):
        found = shown(capsys, path, full=full, samples=2)
        for line in (
            "kind        Megatron token file, uint16",
            "documents   10",
            "ids         0 to 999",
            "document 1:\n  document 0<|endoftext|>",
            "document 10:\n  document 9<|endoftext|>",
            f"problem: 1 x empty document: {prefix}, document 4",
            f"problem: 1 x id beyond the {tokenizer.vocab_size} of the tokenizer: {prefix}, document 8: 999",
            f"problem: 2 x document without the end-of-document token: {prefix}, document 6: ",
        ):
            assert line in found
    Path(f"{prefix}.tokenizer.json").unlink()
    found = shown(capsys, prefix, full=full)
    assert "0 to 999, no tokenizer to decode them" in found and "problem: 1 x empty" in found
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"p\.bin has \d+ bytes, but .* describes \d+: the \.bin is truncated"):
        main(InspectDataConfig(path=prefix, full=full))


def test_a_sample_of_a_long_token_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1 + i % 30 for i in range(3000)]
    prefix = write_pair(tmp_path / "p", [[i % 300] * length for i, length in enumerate(lengths)])
    monkeypatch.setattr(tokens, "SAMPLE_TOKENS", 6400)
    found = shown(capsys, prefix)
    assert "a sample: all lengths, and " in found and f" of {sum(lengths):,} tokens in 6" in found
    assert f"tokens      {sum(lengths):,} ({size_text(2 * sum(lengths))})" in found
    assert "a sample" not in shown(capsys, prefix, full=True)
    for suffix in (".idx", ".bin"):
        Bucket.write(f"b/p{suffix}", Path(prefix + suffix).read_bytes())
    there = shown(capsys, "bucket://b/p")
    assert there.splitlines()[2:] == found.splitlines()[2:]
    Bucket.reset()


def test_histogram() -> None:
    counts = np.array([0, 1, 2, 3, 5, 6, 7, 7])
    assert histogram(counts, "tokens") == [
        "tokens of a document: median 4, mean 4, longest 7",
        "  0 - 0  " + "█" * 10 + " 1",
        "  1 - 1  " + "█" * 10 + " 1",
        "  2 - 3  " + "█" * 20 + " 2",
        "  4 - 7  " + "█" * 40 + " 4",
    ]
    long = histogram(np.array([1, 2**40]), "tokens")
    assert len(long) <= 1 + 16 and sum(int(line.split()[-1]) for line in long[1:]) == 2
    assert histogram(np.array([], dtype=np.int64), "tokens") == []


def test_the_words_of_the_command() -> None:
    assert arguments(["inspect", "a b.jsonl", "full=true"]) == ["full=true", "path='a b.jsonl'"]
    assert arguments(["inspect", "x=1/a.jsonl", "b.txt"]) == ["path=['x=1/a.jsonl',b.txt]"]
    assert arguments(["inspect", "path=a", "--cfg", "job"]) == ["path=a", "--cfg", "job"]
    with pytest.raises(ValueError, match=r"one action, python -m launch\.data inspect PATH, not show"):
        arguments(["show", "a"])


def test_the_command(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.data", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    (tmp_path / "it's one.txt").write_text("words")
    done = run("inspect", f"{tmp_path}/it's one.txt", "samples=1")
    assert done.returncode == 0 and "documents   1\n" in done.stdout, done.stderr
    done = run("inspect", f"{tmp_path}/none.txt")
    assert done.returncode == 2 and "none.txt does not exist" in done.stderr and "Traceback" not in done.stderr
