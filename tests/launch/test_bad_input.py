"""Input of which a part cannot be used: named with file, line and reason, counted, and left out. The command ends with
exit code 2 (a ValueError) where nothing is left, or with strict=true."""

import gzip
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.commands import PrepareConfig
from conf.schema import DataConfig
from corpus import storage
from corpus.prepare import prepare
from corpus.tokenizer import Tokenizer
from launch.prepare import main
from tests.corpus.bucket import Bucket
from tests.corpus.helpers import token_range

TEXTS = [f"Document {i} is about words.\n" for i in range(9)]
EXECUTORS = [
    None,
    pytest.param("local", marks=pytest.mark.skipif(find_spec("datatrove") is None, reason="needs the extra data")),
]


def record(content: bytes, kind: str = "text/plain") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def write_bad(folder: Path) -> dict[str, str]:
    """Files of which nothing, or not all, can be used. Returns what is said about each."""
    folder.mkdir()
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    (folder / "a.jsonl").write_bytes(b'{"text": null}\n{\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines) + b"no gzip")
    (folder / "c.json").write_text('[{"text": "a"}')
    parquet.write_table(arrow.table({"body": TEXTS}), folder / "d.parquet")
    (folder / "e.parquet").write_bytes(b"PAR1 and nothing else")
    table = arrow.table({"text": TEXTS})
    with arrow.ipc.new_stream(str(folder / "f.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "f.arrow").write_bytes((folder / "f.arrow").read_bytes()[:-9])
    (folder / "g.warc").write_bytes(record(b"in the archive") + record(b"another")[:-9])
    (folder / "h.warc").write_bytes(record(b"{}", "application/json"))
    (folder / "i.py").write_bytes(b"print(1)\0")
    (folder / "j.rs").write_bytes("fn main() {}".encode("utf-16"))
    (folder / "k.txt").write_bytes(b"")
    return {
        "a.jsonl": "line 1: field 'text' is null, not a string; none of its 2 rows can be used: left out",
        "b.jsonl.gz": "is damaged after line 9: ",
        "c.json": "is not valid JSON: ",
        "d.parquet": "has no column 'text'; set text_key to one that it has: body: left out",
        "e.parquet": "is damaged after row 0: ",
        "f.arrow": "is ",
        "g.warc": "is damaged after record 1: it ends in the middle of a record: left out",
        "h.warc": "record 1 is application/json, not text/plain: left out",
        "i.py": "1 row skipped (an error with strict=true): is binary, or UTF-16",
        "j.rs": "is in UTF-16, not UTF-8; convert it",
        "k.txt": "is empty: left out",
    }


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    Tokenizer.train(TEXTS, vocab_size=300, eod_token="<|endoftext|>").save(str(tmp_path / "t.json"))
    return str(tmp_path / "t.json")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_rest_is_used(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], executor: str | None
) -> None:
    said = write_bad(tmp_path / "in")
    (tmp_path / "in/z.txt").write_text("all is well")
    files = [str(tmp_path / "in" / name) for name in (*said, "z.txt")]
    settings = {"tokenizer": tokenizer, "executor": executor}
    assert main(PrepareConfig(input=files, output=f"{tmp_path}/made", **settings)) == 0
    printed = capsys.readouterr().out
    for name, what in said.items():
        lines = [line for line in printed.splitlines() if name in line and what in line]
        assert len(lines) == 1 and "(an error with strict=true)" in lines[0], (name, printed)
    prefix = f"{tmp_path}/made" if executor is None else f"{tmp_path}/made/shard_00000"
    tokens = token_range(prefix, 0, printed_documents(printed))
    text = Tokenizer.load(tokenizer, None).decode(tokens.tolist())
    found = text.removesuffix("<|endoftext|>").split("<|endoftext|>")
    of_gzip, of_arrow = found[:9], found[9:-2]
    assert of_gzip == TEXTS and of_arrow == TEXTS[: len(of_arrow)] and found[-2:] == ["in the archive", "all is well"]
    assert len(of_arrow) >= 6
    with pytest.raises(ValueError, match=r"a\.jsonl line 1: field 'text' is null"):
        main(PrepareConfig(input=files, output=f"{tmp_path}/strict", strict=True, **settings))
    of = [file for file in files if file.endswith(("e.parquet", "h.warc"))]
    message = (
        r"e\.parquet is damaged.*; none of the 2 files can" if executor is None else r"no document is left.*h\.warc"
    )
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        main(PrepareConfig(input=of, output=f"{tmp_path}/none", **settings))
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(("strict", "none"))} == set()


def printed_documents(printed: str) -> int:
    return int(printed.split("documents: ")[1].split(",")[0].split()[0])


ROWS = {
    "chat": {"messages": [{"role": "user", "content": "words?"}, {"role": "assistant", "content": "yes"}]},
    "preference": {"prompt": "words?", "chosen": "yes", "rejected": "no"},
    "text": {"text": "some words of a document"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_in_the_data_of_a_run(tmp_path: Path, tokenizer: str, kind: str) -> None:
    """Text, conversations and preferences."""
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text('{"a": 1}\nno JSON\n')
    good.write_text("\n".join(json.dumps(ROWS[kind]).replace("words", f"words {n}") for n in range(40)))
    data = DataConfig(kind=kind, files=[str(bad), str(good)], tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    data.document_mask, data.valid_files = True, [str(good)] if kind != "text" else []
    sizes = {"vocab_size": 300, "sequence_length": 16}
    if kind != "text":  # held-out files are not trained on
        (tmp_path / "more.jsonl").write_text(good.read_text())
        data.files.append(str(tmp_path / "more.jsonl"))
    (note,) = prepare(data, **sizes).notes
    assert note.startswith(f"{bad} line 1") and note.endswith(
        "none of its 2 rows can be used: left out (an error with strict=true)"
    )
    data.strict = True
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1"):
        prepare(data, **sizes)
    data.strict, data.files = False, [str(bad)]
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1.*; none of its 2 rows can be used$"):
        prepare(data, **sizes)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    Bucket.reset()
    yield
    Bucket.reset()


@pytest.mark.parametrize("name", ["b.jsonl", "b.parquet"])
def test_a_file_that_cannot_be_read_now_is_an_error(tmp_path: Path, tokenizer: str, bucket: None, name: str) -> None:
    """Left out, it would be missing from the data only because the network was."""
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "b.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a"}))
    (tmp_path / "a.txt").write_text("all is well")
    Bucket.write(f"b/{name}", (tmp_path / name).read_bytes())

    def refuse(path: str, begin: int, content: bytes) -> bytes:
        raise ConnectionResetError("reset by peer")

    Bucket.answer = staticmethod(refuse)
    config = PrepareConfig(
        input=[f"{tmp_path}/a.txt", f"bucket://b/{name}"], output=f"{tmp_path}/o", tokenizer=tokenizer
    )
    with pytest.raises(ValueError, match=rf"bucket://b/{name} cannot be read: .*reset by peer"):
        main(config)
    assert not [*tmp_path.glob("o*")]
