"""Data behind URLs: text that is read where it is, and token files that are copied into the cache."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.commands import PrepareConfig
from conf.schema import DataConfig
from corpus import storage
from corpus.cache import Cache
from corpus.dataset_specs import DatasetSpec
from corpus.documents import expand, read_documents
from corpus.open_data import training_stream
from corpus.prepare import Prepared, prepare
from corpus.text import TextCorpus
from corpus.tokenizer import Tokenizer
from launch.prepare import main as prepare_main
from tests.corpus.bucket import Bucket, without_network
from tests.corpus.helpers import write_pair

TEXTS = [f"Document {i} is about {'numbers ' * (i % 5)}and words.\n" for i in range(300)]
LIMIT = 60.0
"""Seconds after which something that should have happened did not; nothing depends on it otherwise."""
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    monkeypatch.setattr(storage, "BLOCK", 1000)
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    Bucket.reset()
    yield Bucket
    Bucket.reset()


def run(tmp_path: Path, kind: str, *files: str, **settings: object) -> Prepared:
    data = DataConfig(kind=kind, files=list(files), cache_dir=str(tmp_path / "cache"), valid_fraction=0.1)
    return prepare(replace(data, **{"objects": "copy", **settings}), vocab_size=400, sequence_length=16)


def test_files_in_memory_are_read_as_local_ones(tmp_path: Path) -> None:
    table = arrow.table({"text": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet")
    with arrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    memory = fsspec.filesystem("memory")
    files = {"in/a.jsonl.gz": gzip.compress(LINES), "in/a.parquet": (tmp_path / "a.parquet").read_bytes()}
    files |= {"saved/data.arrow": (tmp_path / "data.arrow").read_bytes(), "code/.git/x.py": b"x", "code/x.py": b"x = 1"}
    files |= {"saved/state.json": b'{"_data_files": [{"filename": "data.arrow"}]}', "in/empty.jsonl": b""}
    for name, content in files.items():
        memory.pipe(f"/test/{name}", content)
    try:
        for pattern in ("in/a.jsonl.gz", "in/*.gz", "in/a.parquet", "saved"):
            (path,) = expand([f"memory://test/{pattern}"])
            assert [document.text for document in read_documents(path, "text")] == TEXTS, pattern
        assert expand(["memory://test/code"]) == ["memory:///test/code/x.py"]
        with pytest.raises(ValueError, match=r"memory://test/b\.jsonl does not exist"):
            expand(["memory://test/b.jsonl"])
        with pytest.raises(ValueError, match=r"memory:///test/in/empty.jsonl is empty"):
            expand(["memory://test/in/empty.jsonl"])
    finally:
        memory.rm("/test", recursive=True)


def test_text_in_a_bucket_is_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    Bucket.write("b/a.jsonl.gz", gzip.compress(LINES))
    here, there = (run(tmp_path, "text", path) for path in (f"{tmp_path}/a.jsonl.gz", "bucket://b/*.jsonl.gz"))
    assert here.key == there.key
    count = len(Bucket.requests)
    assert run(tmp_path, "text", "bucket://b/a.jsonl.gz") == there
    assert len(Bucket.requests) == count  # only its tag was asked for
    Bucket.write("b/a.jsonl.gz", gzip.compress(LINES[: len(LINES) // 2]))
    assert sum(source.num_tokens for source in run(tmp_path, "text", "bucket://b/a.jsonl.gz").train) < sum(
        source.num_tokens for source in there.train
    )


def chat(i: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]}


def preference(i: int) -> dict[str, object]:
    return {"prompt": f"{i}?", "chosen": " good", "rejected": " bad"}


@pytest.mark.parametrize("row", [chat, preference])
def test_conversations_and_preferences(tmp_path: Path, row: Callable[[int], dict[str, object]]) -> None:
    Tokenizer.train(TEXTS, vocab_size=300, eod_token="<|endoftext|>").save(str(tmp_path / "t.json"))
    lines = "\n".join(json.dumps(row(i)) for i in range(40)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    Bucket.write("b/a.jsonl", lines)
    settings = {"tokenizer": str(tmp_path / "t.json"), "document_mask": True}
    found = [run(tmp_path, row.__name__, path, **settings) for path in (f"{tmp_path}/a.jsonl", "bucket://b/a.jsonl")]
    assert found[0].key == found[1].key and found[0].train[0].num_documents + found[0].valid[0].num_documents == 40


def pair(tmp_path: Path, name: str, first: int = 0) -> str:
    """Token files in the bucket; the prefix of the same here."""
    prefix = write_pair(tmp_path / name, [[(first + i + j) % 400 for j in range(1 + i % 40)] for i in range(200)])
    for suffix in (".bin", ".idx"):
        Bucket.write(f"b/{name}{suffix}", Path(prefix + suffix).read_bytes())
    return prefix


def test_training_never_waits_for_a_bucket(tmp_path: Path) -> None:
    prefix = pair(tmp_path, "corpus")
    here, there = run(tmp_path, "megatron", prefix), run(tmp_path, "megatron", "bucket://b/corpus")
    assert here.key == there.key and there.train[0].prefix.startswith(str(tmp_path / "cache"))
    Bucket.answer = staticmethod(lambda *asked: pytest.fail(f"a step of training asked for {asked[:2]}"))
    data = DataConfig(kind="megatron", cache_dir=str(tmp_path / "cache"))
    options = {"sequence_length": 16, "seed": 1}
    streams = [training_stream(prepared, data, **options) for prepared in (here, there)]
    for index in range(500):  # more than two epochs
        assert streams[0].sample(index)["tokens"].tolist() == streams[1].sample(index)["tokens"].tolist()
    assert run(tmp_path, "megatron", "bucket://b/corpus") == there  # a restart takes the copy


def test_one_process_copies_and_the_others_wait(tmp_path: Path) -> None:
    """Threads stand for processes: each holds a lock file of its own."""
    pair(tmp_path, "corpus")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: run(tmp_path, "megatron", "bucket://b/corpus"), range(4)))
    assert all(prepared == found[0] for prepared in found)
    assert len(Bucket.requests) == len(set(Bucket.requests)) > 8


def test_a_token_file_that_was_replaced_is_copied_again(tmp_path: Path) -> None:
    pair(tmp_path, "corpus")
    first = run(tmp_path, "megatron", "bucket://b/corpus")
    pair(tmp_path, "corpus", first=7)  # of the same size
    second = run(tmp_path, "megatron", "bucket://b/corpus")
    assert first.train[0].sha256 != second.train[0].sha256
    assert second.key == run(tmp_path, "megatron", f"{tmp_path}/corpus").key


Answer = Callable[[str, int, bytes], bytes]


def cut_off(path: str, begin: int, content: bytes) -> bytes:
    return content[:-1] if begin == 3000 and path.endswith(".bin") else content


def replaced(path: str, begin: int, content: bytes) -> bytes:
    if begin == 3000 and path.endswith(".bin"):
        Bucket.tags[path] += "x"
    return content


def refused(path: str, begin: int, content: bytes) -> bytes:
    raise RuntimeError("SignatureDoesNotMatch")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (cut_off, r"bucket://b/corpus\.bin cannot be read: it ends after 3,999 of [78],\d{3} bytes"),
        (replaced, r"bucket://b/corpus\.bin cannot be read: it was replaced while it was read; start again"),
        (refused, r"bucket://b/corpus\.idx cannot be read: RuntimeError: SignatureDoesNotMatch"),
    ],
)
def test_a_copy_that_is_cut_off_is_never_used(tmp_path: Path, answer: Answer, message: str) -> None:
    prefix = pair(tmp_path, "corpus")
    Bucket.answer = staticmethod(answer)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "megatron", "bucket://b/corpus")
    assert not list((tmp_path / "cache" / "objects").glob("*/*"))
    Bucket.answer = staticmethod(lambda path, begin, content: content)
    assert run(tmp_path, "megatron", "bucket://b/corpus").key == run(tmp_path, "megatron", prefix).key


def test_a_request_that_fails_is_repeated(tmp_path: Path) -> None:
    prefix, failed = pair(tmp_path, "corpus"), set()

    def once(path: str, begin: int, content: bytes) -> bytes:
        if (path, begin) not in failed:
            failed.add((path, begin))
            raise ConnectionResetError("reset by peer")
        return content

    Bucket.answer = staticmethod(once)
    assert run(tmp_path, "megatron", "bucket://b/corpus").key == run(tmp_path, "megatron", prefix).key


def test_text_that_is_replaced_between_two_passes_is_an_error(tmp_path: Path) -> None:
    Bucket.write("b/a.jsonl", LINES)
    seen = []

    def later(path: str, begin: int, content: bytes) -> bytes:
        seen.append(begin)
        if seen.count(0) == 2:  # the pass after that which looks for held-out documents
            Bucket.tags[path] += "x"
        return content

    Bucket.answer = staticmethod(later)
    with pytest.raises(ValueError, match=r"bucket://b/a\.jsonl cannot be read: it was replaced while it was read"):
        run(tmp_path, "text", "bucket://b/a.jsonl")

    Bucket.reset()
    Bucket.write("b/a.jsonl", LINES)
    corpus = TextCorpus(DatasetSpec("text", ["bucket://b/a.jsonl"], 1.0, 0.0), "text")
    corpus.identity(Cache(str(tmp_path / "cache")))
    assert len(list(corpus.documents("bucket://b/a.jsonl"))) == len(TEXTS)
    Bucket.write("b/a.jsonl", LINES)  # before the pass begins
    with pytest.raises(ValueError, match=r"bucket://b/a\.jsonl was replaced while it was read; start again"):
        list(corpus.documents("bucket://b/a.jsonl"))


def test_blocks_are_requested_ahead_of_what_is_read() -> None:
    content = bytes(range(250)) * 40
    Bucket.write("b/a", content)
    answered: set[int] = set()

    def answer(path: str, begin: int, content: bytes) -> bytes:
        with Bucket.changed:
            assert Bucket.changed.wait_for(lambda: begin in answered, LIMIT)
        return content

    def let(*begins: int) -> None:
        with Bucket.changed:
            answered.update(begins)
            Bucket.changed.notify_all()

    Bucket.answer = staticmethod(answer)
    with storage.ObjectFile("bucket://b/a", ahead=3) as file:
        let(0)
        assert file.read(1) == content[:1]
        Bucket.await_requests(4)  # three blocks are asked for that were not read
        let(1000, 2000, 3000)
        assert file.read(3999) == content[1:4000]  # though no other block is answered
        Bucket.await_requests(7)
        assert {begin for _, begin in Bucket.requests} == set(range(0, 7000, 1000))
        let(*range(4000, 10000, 1000))
        assert file.read() == content[4000:]
        Bucket.requests.clear()
        file.seek(-1500, os.SEEK_END)
        assert file.read(2) == content[-1500:-1498]
        assert Bucket.requests == [("b/a", 8000)]  # out of order: nothing ahead


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "corpus")
    with monkeypatch.context() as patch:
        (tmp_path / "cache").mkdir()
        patch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
        with pytest.raises(ValueError, match=r"data.cache_dir .*cache cannot be written to; set data.cache_dir"):
            run(tmp_path, "megatron", "bucket://b/corpus")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bucket://b/corpus\.idx cannot be read: it does not exist"):
        run(tmp_path, "megatron", "bucket://b/corpus")
    pair(tmp_path, "corpus")
    with pytest.raises(ValueError, match=r"give the prefix only: bucket://b/corpus$"):
        run(tmp_path, "megatron", "bucket://b/corpus.bin")
    with pytest.raises(ValueError, match=r"nowhere://b/a\.jsonl: there is no file system nowhere://"):
        expand(["nowhere://b/a.jsonl"])


def test_a_package_that_is_missing_is_named_with_exit_code_2(tmp_path: Path) -> None:
    code = "import sys; sys.modules['s3fs'] = None; sys.argv[0] = 'prepare'; import runpy; "
    code += "runpy.run_module('launch.prepare', run_name='__main__')"
    words = ["input=s3://bucket/a.jsonl", f"output={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "s3://bucket/a.jsonl needs the package s3fs, which is not installed: .venv/bin/pip install s3fs" in done.stderr
    )


def test_prepare_reads_and_writes_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Bucket.write("b/in/a.jsonl", LINES)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    settings = {"vocab_size": 300}
    assert prepare_main(PrepareConfig(input="bucket://b/in", output="bucket://b/out/corpus", **settings)) == 0
    assert prepare_main(PrepareConfig(input=str(tmp_path / "a.jsonl"), output=str(tmp_path / "out"), **settings)) == 0
    assert list(Bucket.objects) == [
        "b/in/a.jsonl",
        "b/out/corpus.tokenizer.json",
        "b/out/corpus.bin",
        "b/out/corpus.idx",  # last: without it there is no data set
    ]
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        assert Bucket.objects[f"b/out/corpus{suffix}"] == Path(f"{tmp_path}/out{suffix}").read_bytes()
    there = run(tmp_path, "megatron", "bucket://b/out/corpus", tokenizer="bucket://b/out/corpus.tokenizer.json")
    assert there.key == run(tmp_path, "megatron", f"{tmp_path}/out", tokenizer=f"{tmp_path}/out.tokenizer.json").key
    with pytest.raises(ValueError, match=r"bucket://b/out/corpus\.tokenizer\.json exists already"):
        prepare_main(PrepareConfig(input="bucket://b/in", output="bucket://b/out/corpus", **settings))


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("megatron", ["corpus", "more"]),
        ("text", ["in/*.jsonl"]),
        ("text", ["in"]),
        ("text", ["in/a.jsonl", "in/b.jsonl"]),
    ],
)
def test_a_restart_without_a_network_uses_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, files: list[str]
) -> None:
    monkeypatch.setattr("corpus.tokenizer_files.ROOT", str(tmp_path / "root"))
    for name in ("corpus", "more"):
        pair(tmp_path, name)
    for name in ("a", "b"):
        Bucket.write(f"b/in/{name}.jsonl", LINES)
    Tokenizer.train(TEXTS, vocab_size=400, eod_token="<|endoftext|>").save(str(tmp_path / "t.json"))
    Bucket.write("b/t.json", (tmp_path / "t.json").read_bytes())
    urls, how = [f"bucket://b/{file}" for file in files], {"tokenizer": "bucket://b/t.json"}
    first = run(tmp_path, kind, *urls, **how)
    assert first.notes == [] and run(tmp_path, kind, *urls, **how) == first
    with monkeypatch.context() as patch:
        tried = without_network(patch)
        again = run(tmp_path, kind, *urls, **how)
        assert replace(again, notes=[]) == first
        (note,) = again.notes
        assert note.startswith("no answer about bucket://b/") and "ConnectionError: Cannot connect to host" in note
        assert note.endswith("whether the objects have changed is not checked")
        assert len(tried) == 1, "the next questions do not wait for the network"
        for files_of in ("objects", "tokens"):
            for entry in (tmp_path / "cache" / files_of).glob("*/*.bin"):
                entry.unlink()
        with pytest.raises(ValueError, match="Cannot connect to host"):  # what is not complete is not used
            run(tmp_path, kind, *urls, **how)
        with pytest.raises(ValueError, match=r"bucket://b/other.* cannot be read: .*Cannot connect to host"):
            run(tmp_path, kind, "bucket://b/other", **how)
    assert run(tmp_path, kind, *urls, **how).key == first.key
    for name in [*Bucket.objects]:
        if name != "b/t.json":
            del Bucket.objects[name]  # an answer: they are gone
    with pytest.raises(ValueError, match=r"does not exist|matches no file"):
        run(tmp_path, kind, *urls, **how)
