"""Token files: Megatron's format, the same on threads and in worker processes, and continued after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from corpus import encoder, pair_writer, text, token_writer
from corpus.dataset_specs import DatasetSpec
from corpus.encoder import Encoder, EncoderPool
from corpus.indexed import read_index
from corpus.pair_writer import PairWriter, Position, dtype_of, remove_lengths
from corpus.text import TextCorpus, write_corpus
from corpus.token_writer import TokenWriter
from corpus.tokenizer import Tokenizer
from tests.corpus.helpers import write_pair

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i} says {'word ' * (i % 7)}\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300, eod_token="<eod>")


def write(prefix: Path, texts: list[str], tokenizer: Tokenizer, *, measure: bool = False) -> TokenWriter:
    writer = TokenWriter(str(prefix), tokenizer, measure=measure)
    for one in texts:
        writer.add(one)
    writer.finish()
    return writer


@pytest.mark.parametrize("batch", [1, 500, 1 << 20])
def test_megatron_reads_what_was_written(tmp_path, monkeypatch, tokenizer, batch):
    monkeypatch.setattr(Encoder, "batch_characters", batch)
    monkeypatch.setattr("corpus.tokenizer._SEGMENT", 12)
    writer = write(tmp_path / "pair", TEXTS, tokenizer)
    dataset = IndexedDataset(str(tmp_path / "pair"))
    assert writer.num_documents == len(dataset) == len(TEXTS)
    for one, ids in zip(TEXTS, dataset, strict=True):
        assert ids.tolist() == [*tokenizer.encode(one), tokenizer.eod_id]
    assert dataset.index.dtype == np.uint16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.bin", "pair.idx"]


def test_bytes_and_gzip_of_the_text(tmp_path, tokenizer):
    content = "".join(TEXTS).encode()
    writer = write(tmp_path / "pair", TEXTS, tokenizer, measure=True)
    assert writer.num_bytes == len(content)
    if shutil.which("gzip") is None:
        pytest.skip("needs gzip")
    by_gzip = subprocess.run(["gzip", "-9"], input=content, capture_output=True, check=True).stdout
    assert abs(writer.gzip_bytes - len(by_gzip)) <= 0.01 * len(by_gzip)


def test_sixteen_bits_only_where_the_ids_fit(tmp_path, tokenizer):
    tokenizer.vocab_size, before = 70_000, tokenizer.vocab_size
    try:
        write(tmp_path / "pair", TEXTS[:2], tokenizer)
    finally:
        tokenizer.vocab_size = before
    assert read_index(str(tmp_path / "pair")).dtype == np.int32
    assert all(dtype_of(size) == DType.optimal_dtype(size) for size in (1, 65_499, 65_500, 70_000))


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6), max_size=5),
    chunk=st.integers(1, 5),
    kept=st.integers(0, 5),
)
def test_a_pair_is_what_megatron_writes(tmp_path_factory, pieces, chunk, kept):
    """Documents in pieces over several batches, and a writer that continues after some of the batches."""
    folder = tmp_path_factory.mktemp("pair")
    batches = [[*batch, (0, True)] for batch in pieces]  # whole documents, so that each batch can be the last one
    documents, ids = [[]], iter(range(1000))
    values = []
    for batch in batches:
        values.append([[next(ids) for _ in range(length)] for length, _ in batch])
        for piece, (_, last) in zip(values[-1], batch, strict=True):
            documents[-1] += piece
            documents += [[]] if last else []
    expected = write_pair(folder / "expected", documents[:-1])

    def append(writer: PairWriter, batch: int) -> None:
        lengths = np.array([length for length, _ in batches[batch]])
        tokens = np.array([i for piece in values[batch] for i in piece], dtype=np.int64)
        writer.append(np.array([last for _, last in batches[batch]]), tokens, lengths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_writer, "_CHUNK", chunk)
        dtype, position = np.dtype(np.uint16), Position()
        first = PairWriter(str(folder / "made"), dtype)
        for batch in range(len(batches)):
            append(first, batch)
            position = first.position if batch < kept else position
        first.close()
        again = PairWriter(str(folder / "made"), dtype, position)
        for batch in range(min(kept, len(batches)), len(batches)):
            append(again, batch)
        again.finish()
        again.close()
    remove_lengths(str(folder / "made"))
    for suffix in (".bin", ".idx"):
        assert (folder / f"made{suffix}").read_bytes() == Path(expected + suffix).read_bytes()


DOCUMENTS = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two files of documents, one of them long, and the tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"text {i} is {'made of words ' * (i % 11)}" + "." * (i % 3) for i in range(DOCUMENTS)]
    texts[7] *= 3000
    for name, part in (("a", texts[:250]), ("b", texts[250:])):
        rows = [json.dumps({"text": one}) for one in part] + ['{"text": null}']
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_files(corpus: Path, folder: Path, progress: Callable[[str, float], None], workers: int) -> None:
    files = [str(corpus / name) for name in ("a.jsonl", "b.jsonl")]
    of_files = TextCorpus(DatasetSpec("text", files, weight=1.0, valid_share=0.2), "text")
    folder.mkdir(exist_ok=True)
    write_corpus(of_files, str(corpus / "tokenizer.json"), "<eod>", folder, progress, workers=workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(corpus: Path) -> dict[str, bytes]:
    """What one uninterrupted process writes on its threads."""
    write_files(corpus, corpus / "whole", lambda what, done: None, 0)
    return contents(corpus / "whole")


def test_processes_write_what_threads_write(corpus, whole, tmp_path, monkeypatch):
    """Small batches: each worker has several at once, and finishes before or after the others."""
    monkeypatch.setattr(EncoderPool, "batch_characters", 2000)
    monkeypatch.setattr("corpus.tokenizer._SEGMENT", 5000)
    write_files(corpus, tmp_path / "made", lambda what, done: None, 3)
    assert contents(tmp_path / "made") == whole
    assert [*whole] and {"train.bin", "train.idx", "valid.bin", "valid.idx", "manifest.json"} == {*whole}
    assert len(json.loads(whole["manifest.json"])["notes"]) == 2  # a skipped row of each file


KILLED = """
import os, signal, sys
from pathlib import Path
import psutil
from corpus import token_writer
from corpus.dataset_specs import DatasetSpec
from corpus.encoder import Encoder, EncoderPool
from corpus.text import TextCorpus, write_corpus

corpus, folder, at, workers, shard = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
token_writer._SHARD_CHARACTERS = shard
Encoder.batch_characters = EncoderPool.batch_characters = 1500
seen = []

def progress(what, done):
    seen.append(what)
    if len(seen) == at:
        (folder.parent / "workers").write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
        os.kill(os.getpid(), signal.SIGKILL)

folder.mkdir()
files = TextCorpus(DatasetSpec("text", [f"{corpus}/a.jsonl", f"{corpus}/b.jsonl"], weight=1.0, valid_share=0.2), "text")
write_corpus(files, f"{corpus}/tokenizer.json", "<eod>", folder, progress, workers=workers)
"""
SHARD = 4000


def kill_at(document: int, corpus: Path, folder: Path, workers: int) -> None:
    """A process that tokenises is killed at a document."""
    command = [sys.executable, "-c", KILLED, *map(str, (corpus, folder, document, workers, SHARD))]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode == -signal.SIGKILL


@pytest.mark.parametrize(("workers", "at"), [(0, 150), (0, 350), (2, 350)])
def test_a_killed_process_is_continued_without_repeating_a_shard(corpus, whole, tmp_path, monkeypatch, workers, at):
    """In the first file or in the second one; worker processes end with it."""
    folder = tmp_path / "made"
    kill_at(at, corpus, folder, workers)
    assert not (folder / "manifest.json").exists()
    journal = json.loads((folder / "journal.json").read_text())["content"]
    recorded = sum(documents for documents, *_ in journal["splits"].values())
    assert (0 if workers else at - 80) < recorded < at  # workers may have had the batches of several shards
    encoded: list[str] = []
    add = TokenWriter.add
    monkeypatch.setattr(TokenWriter, "add", lambda self, one: encoded.append(one) or add(self, one))
    monkeypatch.setattr(token_writer, "_SHARD_CHARACTERS", SHARD)
    write_files(corpus, folder, lambda what, done: None, 0)
    assert len(encoded) == DOCUMENTS - recorded
    made = contents(folder)
    assert {name: made[name] for name in made if name != "manifest.json"} == {
        name: whole[name] for name in whole if name != "manifest.json"
    }
    manifests = [json.loads(one["manifest.json"]) for one in (made, whole)]
    gzips = [manifest["held_out"].pop("valid_gzip_bytes") for manifest in manifests]
    assert manifests[0] == manifests[1] and gzips[0] > gzips[1]  # in members, one for each shard
    left = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(left) == workers
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, left))


def test_a_journal_that_does_not_fit_is_not_used(corpus, whole, tmp_path, monkeypatch):
    folder = tmp_path / "made"
    kill_at(200, corpus, folder, 0)
    os.truncate(folder / "train.bin", 10)
    write_files(corpus, folder, lambda what, done: None, 0)
    assert contents(folder) == whole


def test_a_worker_that_is_killed_is_an_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(EncoderPool, "batch_characters", 2000)
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(encoder.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def progress(what: str, done: float) -> None:
        if done > 0.2:
            started[0].kill()

    with pytest.raises(RuntimeError, match="a process that tokenises ended with exit code -9; it was killed"):
        write_files(corpus, tmp_path / "made", progress, 1)
    assert all(one.poll() is not None for one in started)


def test_only_a_large_corpus_starts_processes(corpus, tmp_path, monkeypatch):
    asked: list[int] = []
    open_encoder = token_writer.open_encoder
    monkeypatch.setattr(
        token_writer, "open_encoder", lambda t, d, workers: asked.append(workers) or open_encoder(t, d, 0)
    )
    monkeypatch.setattr(encoder, "usable_cores", lambda: 5)
    for large in (1 << 30, 1 << 10):
        monkeypatch.setattr(text, "_LARGE", large)
        write_files(corpus, tmp_path / str(large), lambda what, done: None, None)
    assert asked == [0, 5]
