"""Token files in a bucket that are read by blocks, ahead of the steps that need them."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.schema import Config, DataConfig
from corpus import object_blocks, storage
from corpus.indexed import TokenFile
from corpus.integrity import sha256
from corpus.object_blocks import ObjectBlocks, is_complete
from corpus.open_data import held_out_samples, training_stream
from corpus.prepare import Prepared, prepare
from corpus.stream import Stream
from corpus.tokenizer import Tokenizer
from tests.corpus.bucket import Bucket, without_network
from tests.corpus.helpers import write_pair
from training.batches import read_batches

LIMIT = 300.0
"""Seconds after which something that should have happened did not; nothing depends on it otherwise."""
SIZE, BATCH = 32, 2


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(object_blocks, "BLOCK", 256)
    monkeypatch.setattr(object_blocks, "_REQUESTS", 64)
    monkeypatch.setattr(storage, "BLOCK", 4000)
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    Bucket.reset()
    yield
    Bucket.reset()


def pair(folder: Path, name: str = "corpus", documents: int = 300) -> str:
    """Token files in the bucket; the prefix of the same here."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 80, documents)
    prefix = write_pair(folder / name, [draw.integers(1, 400, length).tolist() for length in lengths])
    for suffix in (".bin", ".idx"):
        Bucket.write(f"b/{name}{suffix}", Path(prefix + suffix).read_bytes())
    return prefix


def config_of(folder: Path, *files: str, **settings: Any) -> Config:
    config = Config()
    how = {"files": list(files), "cache_dir": str(folder / "cache"), "valid_fraction": 0.1, **settings}
    config.data = replace(DataConfig(kind="megatron"), **how)
    config.train = replace(config.train, sequence_length=SIZE, global_batch_size=BATCH, micro_batch_size=1, steps=10**6)
    return config


def prepared_of(config: Config) -> Prepared:
    return prepare(config.data, vocab_size=400, sequence_length=SIZE)


def stream_of(config: Config, prepared: Prepared | None = None) -> Stream:
    return training_stream(prepared or prepared_of(config), config.data, sequence_length=SIZE, seed=3)


def blocks_asked() -> list[int]:
    """The first bytes of all requests for tokens."""
    return [begin for path, begin in Bucket.requests if path.endswith(".bin")]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_samples_are_those_of_a_local_file(tmp_path: Path, packing: str) -> None:
    prefix = pair(tmp_path)
    configs = [config_of(tmp_path, path, packing_strategy=packing) for path in (prefix, "bucket://b/corpus")]
    here, there = map(prepared_of, configs)
    assert blocks_asked() == [], "the start needs the index alone"
    assert [(s.num_documents, s.num_tokens) for s in there.train] == [
        (s.num_documents, s.num_tokens) for s in here.train
    ]
    local, remote = (stream_of(config, prepared) for config, prepared in zip(configs, (here, there), strict=True))
    for index in range(700):  # more than an epoch
        expected, found = local.sample(index), remote.sample(index)
        assert expected.keys() == found.keys() and all(expected[key].equal(found[key]) for key in expected)
        if index == 0:
            assert len(blocks_asked()) < 10
    windows = [held_out_samples(prepared, configs[0].data, sequence_length=SIZE) for prepared in (here, there)]
    for index in range(len(windows[0])):
        assert windows[0].sample(index)["tokens"].equal(windows[1].sample(index)["tokens"])
    assert sorted(blocks_asked()) == list(range(0, len(Bucket.objects["b/corpus.bin"]), 256)), "each once"
    again = stream_of(configs[1])
    assert again.sample(5)["tokens"].equal(local.sample(5)["tokens"])
    assert len(blocks_asked()) == len(set(blocks_asked())), "what has arrived is kept"
    assert there.key != here.key and prepared_of(configs[1]).key == there.key


class Clock:
    """Counts steps, and answers requests for tokens some steps after they came."""

    def __init__(self, delay: int) -> None:
        self.now, self.delay = 0, delay
        self.due: dict[int, int] = {}
        """Of each block that was requested."""
        self.changed = threading.Condition()

    def answer(self, path: str, begin: int, content: bytes) -> bytes:
        if path.endswith(".bin"):
            with self.changed:
                self.due[begin] = self.now + self.delay
                assert self.changed.wait_for(lambda: self.now >= self.due[begin], LIMIT)
        return content

    def is_later(self, *begins: int) -> bool:
        """Whether the answer about a block comes later than now. False without a block."""
        return any(self.due.get(begin, -1) > self.now for begin in begins)

    def tick(self, steps: int = 1) -> None:
        with self.changed:
            self.now += steps
            self.changed.notify_all()


@pytest.mark.parametrize(("read_ahead", "delay", "waits"), [(2, 4, False), (3, 6, False), (2, 12, True), (0, 1, True)])
def test_no_step_waits_where_read_ahead_suffices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_ahead: int, delay: int, waits: bool
) -> None:
    """Time is counted in steps: a request is answered `delay` steps after it came."""
    prefix, steps = pair(tmp_path, documents=3000), 30
    config = config_of(tmp_path, "bucket://b/corpus", read_ahead=read_ahead)
    stream = stream_of(config)
    clock = Clock(delay)
    Bucket.answer = staticmethod(clock.answer)
    blocked: list[int] = []
    wait_for = ObjectBlocks._wait_for

    def noted(self: ObjectBlocks, number: int) -> None:
        blocked.append(number * 256)
        wait_for(self, number)
        blocked.clear()

    monkeypatch.setattr(ObjectBlocks, "_wait_for", noted)
    groups = SimpleNamespace(dp=SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    batches = read_batches(config, stream, groups, first_sample=0, steps=10**6)
    requested: dict[int, Future[None]] = stream._epochs[0]._file._object._requested
    local, waited = stream_of(config_of(tmp_path, prefix)), []
    with ThreadPoolExecutor(1) as thread:
        for step in range(steps):
            taken = None if read_ahead else thread.submit(batches.next)

            def idle(taken: Future[Any] | None = taken) -> bool:
                """Whether nothing more happens before the clock goes on."""
                ended = taken.done() if taken else len(batches._ready) == read_ahead
                return (ended or clock.is_later(*blocked[:1])) and all(
                    future.done() or clock.is_later(number * 256) for number, future in [*requested.items()]
                )

            await_(idle)
            while not (taken.done() if taken else batches._ready):
                waited.append(step)
                clock.tick()
                await_(idle)
            for number, batch in enumerate(taken.result(LIMIT) if taken else batches.next()):
                assert batch["tokens"][0].equal(local.sample(step * BATCH + number)["tokens"])
            await_(idle)
            clock.tick()
        clock.tick(10**9)
        batches.close()
    later = {step for step in waited if step}  # the first step waits for its own blocks
    assert len(later) > steps // 2 if read_ahead == 0 else bool(later) == waits, waited


def await_(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def token_file(config: Config) -> TokenFile:
    (source,) = prepared_of(config).train
    return TokenFile(source.prefix, source.id_limit)


def killed_while_it_writes(config: Config, count: int) -> None:
    """A process that reads tokens, and is killed in the middle of writing a block after `count` others."""
    written: list[int] = []
    write = object_blocks._write

    def torn(file: int, content: bytes, begin: int) -> None:
        if len(written) == 2 * count:  # a block and its checksum
            write(file, content[: len(content) // 2], begin)
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(begin)
        write(file, content, begin)

    child = os.fork()
    if child == 0:
        try:
            object_blocks._REQUESTS, object_blocks._write = 1, torn
            token_file(config).read(0, 100_000)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_what_a_killed_process_has_kept_is_used_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = TokenFile(pair(tmp_path, documents=3000)).read(0, 100_000)
    config = config_of(tmp_path, "bucket://b/corpus")
    token_file(config)  # the index
    killed_while_it_writes(config, count=5)
    tokens = 256 // 2  # of a block
    with monkeypatch.context() as patch:
        without_network(patch)
        prepared = prepared_of(config)
        assert "what is in data.cache_dir is used" in prepared.notes[0]
        file = TokenFile(prepared.train[0].prefix, 400)
        assert np.array_equal(file.read(0, 5 * tokens), expected[: 5 * tokens])
        for begin in (5 * tokens, 20 * tokens):  # one that is half written, and one that has not arrived
            with pytest.raises(
                OSError, match=r"b/corpus\.bin cannot be read: Conn.* blocks that have arrived are kept"
            ):
                file.read(begin, 10)
        file.request(40 * tokens, 1)
        assert file._object and file._object._requested[40].exception(LIMIT)
    Bucket.requests.clear()
    assert file.read(40 * tokens, 1) == expected[40 * tokens], "what failed ahead of time is requested again"
    assert np.array_equal(file.read(0, 100_000), expected)
    assert min(blocks_asked()) == 5 * 256

    blocks = Path(f"{prepared.train[0].prefix}.blocks")
    content = bytearray(blocks.read_bytes())
    content[300] ^= 1  # as if the node had lost power before the second block was on the disk
    blocks.write_bytes(content)
    Bucket.requests.clear()
    assert np.array_equal(token_file(config).read(0, 100_000), expected) and blocks_asked() == [256]


def test_processes_of_a_node_request_a_block_once(tmp_path: Path) -> None:
    expected = TokenFile(pair(tmp_path)).read(0, 10)
    config = config_of(tmp_path, "bucket://b/corpus")
    file = token_file(config)
    (has_lock, say_lock), (may_go, say_go) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        blocks = ObjectBlocks(prepared_of(config).train[0].prefix)
        with blocks._one_process(0):
            os.write(say_lock, b"x")
            os.read(may_go, 1)
            blocks._get(0)
        os._exit(0)
    os.read(has_lock, 1)
    file.request(0, 10)
    time.sleep(0.1)  # for a thread that does not wait, so that it is seen
    os.write(say_go, b"x")
    assert np.array_equal(file.read(0, 10), expected) and blocks_asked() == []
    os.waitpid(child, 0)
    for end in (has_lock, say_lock, may_go, say_go):
        os.close(end)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    pair(tmp_path)
    config = config_of(tmp_path, "bucket://b/corpus")
    file = token_file(config)
    Bucket.write("b/corpus.bin", bytes(len(Bucket.objects["b/corpus.bin"])))
    with pytest.raises(OSError, match=r"b/corpus\.bin cannot be read: it was replaced while it was read; start again"):
        file.read(0, 10)
    assert not is_complete(file.prefix) and token_file(config).read(0, 10).tolist() == [0] * 10
    pair(tmp_path)
    with pytest.raises(
        ValueError, match=r"b/corpus\.bin has \d+ at token \d+, but ids are whole numbers from 0 to 99; "
    ):
        TokenFile(prepared_of(config).train[0].prefix, 100).read(0, 1000)
    with pytest.raises(ValueError, match=r"bucket://b/other\.idx cannot be read: it does not exist"):
        prepared_of(config_of(tmp_path, "bucket://b/other"))
    Bucket.write("b/corpus.bin", Bucket.objects["b/corpus.bin"][:-2])
    with pytest.raises(ValueError, match=r"\.bin has \d+ bytes, but .*\.idx describes \d+: the \.bin is truncated"):
        prepared_of(config)


def test_a_copy_that_is_there_is_used(tmp_path: Path) -> None:
    pair(tmp_path)
    copied = prepared_of(config_of(tmp_path, "bucket://b/corpus", objects="copy"))
    assert prepared_of(config_of(tmp_path, "bucket://b/corpus")) == copied


def test_a_folder_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.tokenizer_files.ROOT", str(tmp_path / "root"))
    prefixes = [pair(tmp_path, name, documents) for name, documents in (("shard_00000", 200), ("shard_00001", 100))]
    shards = []
    for prefix in prefixes:
        name = Path(prefix).name
        shards.append({"name": name, **{s: {"bytes": Path(f"{prefix}.{s}").stat().st_size} for s in ("bin", "idx")}})
        for suffix in (".bin", ".idx"):
            Bucket.objects[f"b/made/{name}{suffix}"] = Bucket.objects.pop(f"b/{name}{suffix}")
            Bucket.tags[f"b/made/{name}{suffix}"] = "1"
    Tokenizer.train(["abc"], vocab_size=300, eod_token="<|endoftext|>").save(str(tmp_path / "t.json"))
    made = {"sha256": sha256(tmp_path / "t.json"), "file": "tokenizer.json"}
    Bucket.write("b/made/manifest.json", json.dumps({"format": 1, "shards": shards, "tokenizer": made}).encode())
    here, there = (prepared_of(config_of(tmp_path, *files)) for files in (prefixes, ["bucket://b/made"]))
    assert [s.num_tokens for s in here.train] == [s.num_tokens for s in there.train]
    with monkeypatch.context() as patch:
        without_network(patch)
        assert prepared_of(config_of(tmp_path, "bucket://b/made")).train == there.train
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"bucket://b/made was made with another tokenizer than data\.tokenizer="):
        prepared_of(config_of(tmp_path, "bucket://b/made", tokenizer=str(tmp_path / "t.json")))
    Bucket.write("b/made/shard_00001.bin", b"short")
    with pytest.raises(ValueError, match=r"shard_00001\.bin has 5 bytes, but manifest\.json says"):
        prepared_of(config_of(tmp_path, "bucket://b/made"))
