import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.schema import BlendPart, DataConfig
from corpus.documents import standard_library_files
from corpus.prepare import Prepared, Source, prepare
from corpus.tokenizer import Tokenizer
from tests.corpus.helpers import token_range, write_pair

EOD = "<|endoftext|>"


def sentences(count: int, word: str = "word") -> list[str]:
    return [f"{word} {i}: the quick brown fox jumps over the lazy dog.\n" * (1 + i % 3) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.fixture
def text_data(tmp_path: Path) -> DataConfig:
    file = write_jsonl(tmp_path / "corpus.jsonl", sentences(200))
    return DataConfig(kind="text", files=[file], valid_fraction=0.1, cache_dir=str(tmp_path / "cache"))


def run(data: DataConfig, vocab_size: int = 400, sequence_length: int = 32, **options) -> Prepared:
    return prepare(data, vocab_size=vocab_size, sequence_length=sequence_length, **options)


def documents_of(prepared: Prepared, sources: list[Source]) -> list[str]:
    """The texts of some sources, by way of their token files."""
    tokenizer = Tokenizer.load(prepared.tokenizer, EOD)
    texts = []
    for source in sources:
        ids = token_range(source.prefix, source.first_document, source.num_documents)
        assert ids[-1] == prepared.eod_id
        ends = np.flatnonzero(ids == prepared.eod_id)
        assert len(ends) == source.num_documents and len(ids) == source.num_tokens
        texts += [tokenizer.decode(part[part != prepared.eod_id].tolist()) for part in np.split(ids, ends[:-1] + 1)]
    return texts


def test_text_is_split_and_nothing_is_lost(text_data):
    prepared = run(text_data)
    train, valid = documents_of(prepared, prepared.train), documents_of(prepared, prepared.valid)
    texts = sentences(200)
    assert sorted(train + valid) == sorted(texts)
    assert 8 <= len(valid) <= 35  # 20 expected, standard deviation 4.2
    assert [text for text in texts if text in set(valid)] == valid  # in file order
    assert prepared.valid_bytes == len("".join(valid).encode())
    assert prepared.valid_gzip_bytes == pytest.approx(len(gzip.compress("".join(valid).encode(), 9)), rel=0.01)
    assert (prepared.vocab_size, prepared.train[0].weight) == (400, 1.0)
    assert Prepared.from_json(prepared.to_json()) == prepared


def test_a_corpus_that_grows_keeps_its_held_out_documents(text_data, tmp_path):
    before = run(text_data)
    text_data.files = [write_jsonl(tmp_path / "more.jsonl", sentences(50, "new")), *text_data.files]
    after = run(text_data)
    old = [text for text in documents_of(after, after.valid) if not text.startswith("new")]
    assert old == documents_of(before, before.valid)
    assert len(documents_of(after, after.valid)) > len(old)


def test_a_small_corpus_holds_out_one_document(text_data, tmp_path):
    text_data.files, text_data.valid_fraction = [write_jsonl(tmp_path / "small.jsonl", sentences(5))], 1e-9
    prepared = run(text_data)
    assert (prepared.train[0].num_documents, prepared.valid[0].num_documents) == (4, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_of_few_long_documents_the_tail_of_one_is_held_out(text_data, tmp_path, count):
    texts = ["".join(f"{i}. In book {book} the fox jumps.\n" for i in range(900)) for book in range(count)]
    files = [tmp_path / f"{book}.txt" for book in range(count)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    text_data.files, text_data.valid_fraction = [str(file) for file in files], 0.02
    prepared = run(text_data)
    (tail,) = documents_of(prepared, prepared.valid)
    train = documents_of(prepared, prepared.train)
    (i,) = [i for i, text in enumerate(texts) if text.endswith(tail)]
    assert train == [text.removesuffix(tail) if i == j else text for j, text in enumerate(texts)]
    assert tail.endswith(f"899. In book {i} the fox jumps.\n") and tail[0].isdigit()  # whole lines
    assert 4000 < len(tail) <= 4096 and prepared.valid_bytes == len(tail)
    (note,) = prepared.notes
    assert f"the last {len(tail):,} characters of {files[i]} are held out" in note and "data.valid_files" in note
    assert run(replace(text_data, cache_dir=str(tmp_path / "other"))).key == prepared.key


def test_equal_documents_are_split_alike(text_data, tmp_path):
    text = "".join(f"{i} is a number\n" for i in range(500))
    text_data.files = [write_jsonl(tmp_path / "one.jsonl", [text] * 3)]
    prepared = run(text_data)
    (tail, *tails), (head, *heads) = documents_of(prepared, prepared.valid), documents_of(prepared, prepared.train)
    assert tails == [tail] * 2 and heads == [head] * 2 and head + tail == text and 0 < len(tail) <= len(text) // 4


def test_rows_without_text(text_data, tmp_path):
    with open(text_data.files[0], "a") as file:
        file.write('\n{"text": null}\nnot JSON\n')
    prepared = run(text_data)
    assert sorted(documents_of(prepared, prepared.train + prepared.valid)) == sorted(sentences(200))
    (note,) = prepared.notes
    assert note.startswith(f"{text_data.files[0]}: 2 rows skipped") and "line 201: field 'text' is null" in note
    refused(replace(text_data, strict=True), r"line 201: field 'text' is null, not a string")


def test_held_out_text_does_not_teach_the_tokenizer(text_data, tmp_path):
    before = run(text_data)
    held_out = set(documents_of(before, before.valid))
    file = Path(text_data.files[0])
    file.write_text("\n".join(json.dumps({"text": t}) for t in sentences(200) if t not in held_out))
    text_data.valid_files = [write_jsonl(tmp_path / "valid.jsonl", ["xylophonexylophone " * 99])]
    after = run(text_data)
    assert Path(after.tokenizer).read_bytes() == Path(before.tokenizer).read_bytes()


def test_the_sample_for_the_tokenizer_draws_on_every_file(text_data, tmp_path):
    words = ["alpha", "beta"]
    text_data.files = [write_jsonl(tmp_path / f"{word}.jsonl", [f" {word}" * 150_000] * 4) for word in words]
    text_data.tokenizer_sample_mib = 1
    text_data.valid_files = [write_jsonl(tmp_path / "valid.jsonl", sentences(20))]
    tokenizer = Tokenizer.load(run(text_data, vocab_size=270).tokenizer, EOD)
    assert [len(tokenizer.encode(f" {word}")) for word in words] == [1, 1]


def test_standard_library_is_split_by_path(tmp_path, monkeypatch):
    files = [path for path in standard_library_files() if "/json/" in path or "/email/" in path]
    monkeypatch.setattr("corpus.sources.standard_library_files", lambda: files)
    data = DataConfig(valid_fraction=0.2, cache_dir=str(tmp_path))
    prepared = run(data, vocab_size=600)
    valid = documents_of(prepared, prepared.valid)
    expected = [text for path in files if (text := Path(path).read_text()) in set(valid)]
    assert valid == expected and 1 <= len(valid) <= len(files) // 2
    assert sorted(valid + documents_of(prepared, prepared.train)) == sorted(
        t for p in files if (t := Path(p).read_text())
    )
    monkeypatch.setattr("corpus.sources.standard_library_files", lambda: files[: len(files) // 2])
    fewer = run(data, vocab_size=600)
    assert set(documents_of(fewer, fewer.valid)) <= set(valid)


WARM = """
import sys
from conf.schema import DataConfig
from corpus.prepare import prepare
print(prepare(DataConfig(kind="text", files=[sys.argv[1]], valid_fraction=0.1, cache_dir=sys.argv[2]),
              vocab_size=400, sequence_length=32).to_json())
assert not {"torch", "megatron", "numpy", "tokenizers"} & set(sys.modules)
"""


def test_a_second_start_reads_nothing_and_imports_nothing_heavy(text_data):
    cold = run(text_data)
    warm = subprocess.run(
        [sys.executable, "-c", WARM, text_data.files[0], text_data.cache_dir], capture_output=True, text=True
    )
    assert warm.returncode == 0, warm.stderr
    assert Prepared.from_json(warm.stdout) == cold


def test_what_changes_the_tokens_is_prepared_anew(text_data, tmp_path):
    prefixes = {run(text_data).train[0].prefix}
    for change in ({"valid_fraction": 0.2}, {"eod_token": "<eod>"}):
        prefixes.add(run(replace(text_data, **change)).train[0].prefix)
    prefixes.add(run(text_data, vocab_size=300).train[0].prefix)
    Path(text_data.files[0]).write_text(Path(text_data.files[0]).read_text().replace("fox", "cat"))
    prefixes.add(run(text_data).train[0].prefix)
    assert len(prefixes) == 5
    copy = tmp_path / "elsewhere" / "corpus.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(text_data.files[0]).read_bytes())
    assert run(replace(text_data, files=[str(copy)])).train[0].prefix in prefixes  # content counts, not the place


def test_a_damaged_cache_is_made_again(text_data):
    prepared = run(text_data)
    files = [Path(prepared.train[0].prefix + ".bin"), Path(prepared.tokenizer)]
    files += [files[0].with_name(name) for name in ("valid.idx", "manifest.json", "files.json")]
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:9] + bytes([whole[9] ^ 0x80]) + whole[10:])
        again = run(text_data)
        (note,) = again.notes
        assert str(file.parent) in note and file.name in note and "it was rebuilt" in note
        assert replace(again, notes=[]) == prepared and again.key == prepared.key and file.read_bytes() == whole
    (Path(text_data.cache_dir) / "facts.json").write_bytes(b"\xff")
    assert run(text_data) == prepared


def test_a_warm_cache_is_read_without_write_access(text_data, monkeypatch):
    prepared = run(text_data)
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("corpus.cache.Cache._locked", lambda self, path: pytest.fail("a lock is written to"))
    monkeypatch.setattr("corpus.integrity.write_sealed", lambda path, content: pytest.fail("it is written to"))
    assert run(text_data) == prepared
    (Path(text_data.cache_dir) / "facts.json").unlink()
    assert run(text_data) == prepared
    refused(text_data, "is not there, and data.cache_dir .* cannot be written to; set data.cache_dir", vocab_size=300)
    Path(prepared.train[0].prefix + ".bin").write_bytes(b"")
    refused(
        text_data, r"is damaged \(train\.bin has 0 bytes instead of \d+\), and data.cache_dir .* cannot be written to"
    )


def test_the_key_is_that_of_the_content(text_data, pairs, tmp_path):
    key = run(text_data).key
    moved = [str(shutil.move(text_data.files[0], tmp_path / "moved.jsonl"))]
    assert run(replace(text_data, files=moved, cache_dir=str(tmp_path / "another"))).key == key
    lines = Path(moved[0]).read_text()
    write_jsonl(Path(text_data.files[0]), sentences(200))
    assert run(text_data).key == key
    Path(text_data.files[0]).write_text(lines.replace("word 7:", "word 8:"))
    assert run(text_data).key != key
    a, _ = pairs
    megatron = replace(text_data, kind="megatron", files=[a])
    key = run(megatron, sequence_length=16).key
    with open(a + ".bin", "r+b") as file:
        file.write(b"\x07")
    assert run(megatron, sequence_length=16).key != key


def test_prepared_at_once_by_several(text_data):
    results: list[Prepared] = []
    stages: list[str] = []

    def one() -> None:
        results.append(run(text_data, progress=lambda what, done: stages.append(what) if done == 1.0 else None))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and results[0] == results[1] == results[2]
    assert stages.count("training the tokenizer") == 1
    assert stages.count("tokenising") == 200  # once per document


def test_invalid_utf8_is_reported(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"\xff\xfe" + "".join(sentences(20)).encode())
    (tmp_path / "valid.txt").write_text("".join(sentences(20, "other")))
    data = DataConfig(kind="text", files=[f"{tmp_path}/*.txt"], valid_files=[f"{tmp_path}/valid.txt"])
    data.cache_dir = str(tmp_path / "cache")
    prepared = run(data)
    assert prepared.notes == [f"2 invalid UTF-8 sequences replaced in {tmp_path}/notes.txt"]
    assert len(documents_of(prepared, prepared.train)) == 1  # the glob matches valid.txt too, which is held out
    assert documents_of(prepared, prepared.valid) == ["".join(sentences(20, "other"))]


def test_own_text_for_evaluation(text_data, tmp_path):
    tokenizer = run(text_data).tokenizer
    own = DataConfig(kind="text", files=[write_jsonl(tmp_path / "own.jsonl", ["short"])], tokenizer=tokenizer)
    own.cache_dir = text_data.cache_dir
    prepared = run(own, held_out_only=True)
    assert prepared.train == [] and documents_of(prepared, prepared.valid) == ["short"]
    assert prepared.valid_bytes == 5


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, list[list[int]]]:
    documents = {"a": [[i, 2, 0] for i in range(100)], "b": [[7] * 29 + [0]] * 10}
    return {write_pair(tmp_path / name, content): content for name, content in documents.items()}


def test_megatron_data_holds_out_the_last_documents(pairs, tmp_path):
    data = DataConfig(kind="megatron", files=list(pairs), valid_fraction=0.1, cache_dir=str(tmp_path / "cache"))
    prepared = run(data)
    a, b = pairs
    assert prepared.train == [Source(a, 0.5, 0, 90, 270), Source(b, 0.5, 0, 9, 270)]
    assert prepared.valid == [Source(a, 0.5, 90, 10, 30), Source(b, 0.5, 9, 1, 30)]
    assert (prepared.tokenizer, prepared.vocab_size, prepared.eod_id) == (None, 100, None)
    assert prepared.valid_bytes is prepared.valid_gzip_bytes is None
    held_out = run(replace(data, files=[a], valid_files=[b]))
    assert held_out.train == [Source(a, 1.0, 0, 100, 300)] and held_out.valid == [Source(b, 1.0, 0, 10, 300)]


def test_a_file_shorter_than_a_sequence_is_left_out(pairs, tmp_path):
    a, b = pairs
    short = [write_pair(tmp_path / f"short{n}", [[1, 2, n]] * 3) for n in range(5)]
    data = DataConfig(kind="megatron", files=[a, *short, b], valid_fraction=0.1, cache_dir=str(tmp_path / "cache"))
    prepared = run(data, sequence_length=16)
    assert prepared.train == [Source(a, 0.5, 0, 90, 270), Source(b, 0.5, 0, 9, 270)]
    (note,) = prepared.notes
    assert note.startswith("shorter than a sequence of 17 tokens: left out (an error with data.strict=true): ")
    assert f"{short[0]}.bin: 6 tokens; " in note and note.endswith("; and 2 more")
    refused(replace(data, strict=True), r"too little text: 6 tokens .*short0\.bin", sequence_length=16)
    refused(replace(data, files=short), r"too little text: 6 tokens .*short0\.bin", sequence_length=16)
    parts = [BlendPart(kind="megatron", files=[short[0], a], weight=1), BlendPart(kind="megatron", files=[b], weight=3)]
    blend = run(replace(data, kind="blend", files=[], blend=parts), sequence_length=16)
    assert [(source.prefix, source.weight) for source in blend.train] == [(a, 0.25), (b, 0.75)]


def test_token_ids_are_scanned_once(pairs, tmp_path, monkeypatch):
    data = DataConfig(kind="megatron", files=list(pairs), valid_fraction=0.1, cache_dir=str(tmp_path / "cache"))
    run(data)
    monkeypatch.setattr("corpus.indexed.extreme_ids", lambda prefix: pytest.fail("scanned again"))
    run(data)


def test_blend(text_data, pairs, tmp_path):
    a, b = pairs
    tokenizer = run(text_data).tokenizer
    parts = [
        BlendPart(weight=3, kind="text", files=text_data.files),
        BlendPart(weight=1, kind="megatron", files=[a, b]),
    ]
    data = replace(text_data, kind="blend", files=[], blend=parts, tokenizer=tokenizer)
    prepared = run(data)
    assert [source.weight for source in prepared.train] == [0.75, 0.125, 0.125]
    assert len(prepared.valid) == 3 and prepared.valid_bytes is None
    text = run(replace(text_data, tokenizer=tokenizer))
    assert prepared.train[0].prefix == text.train[0].prefix  # tokenised once
    other = write_jsonl(tmp_path / "other.jsonl", sentences(100, "zebra"))
    parts = [BlendPart(weight=1, files=text_data.files), BlendPart(weight=1, files=[other])]
    texts = run(replace(data, blend=parts, tokenizer=None))
    valid = documents_of(texts, texts.valid)
    assert texts.valid_bytes == len("".join(valid).encode())
    shared = Tokenizer.load(texts.tokenizer, EOD)
    assert [len(shared.encode(word)) for word in ("word", "zebra")] == [1, 1]  # trained on both


def refused(data: DataConfig, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, **options)


def test_text_and_tokenizers_that_do_not_fit(text_data, tmp_path):
    refused(text_data, r"vocab_size=100 is too small", vocab_size=100)
    refused(
        text_data, r"\d+ tokens to train on .*, but one sequence takes 100000; .*=\d+ or less", sequence_length=99999
    )
    refused(text_data, r"held-out text has \d+ tokens, but one sequence takes 1001; raise data.valid_fraction=0.1 or "
            r"set train.sequence_length=\d+ or less", sequence_length=1000)  # fmt: skip
    tokenizer = run(text_data).tokenizer
    given = replace(text_data, tokenizer=tokenizer)
    refused(given, r"has 400 tokens, more than model\.vocab_size=399; set model\.vocab_size=400", vocab_size=399)
    refused(replace(given, eod_token="</s>"), r"has no token '</s>'; set eod_token to one that it has: ")
    refused(replace(given, tokenizer=tokenizer + "x"), r"does not exist; did you mean .*tokenizer\.json\?")
    one = write_jsonl(tmp_path / "one.jsonl", ["a single document " * 50])
    refused(
        replace(text_data, files=[one]),
        r"held-out text has \d+ tokens, .*; raise data.valid_fraction=0.1 or",
        sequence_length=64,
    )
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", ""])
    refused(replace(text_data, files=[blank]), "no document is left to train on")
    refused(replace(text_data, valid_files=text_data.files), "data.valid_files names all files of the data")


def test_settings_that_do_not_fit(text_data, pairs):
    a, _ = pairs
    refused(replace(text_data, kind="stdlib"), "data=stdlib has no files; .* data=text")
    refused(replace(text_data, files=[]), "data of kind text needs files: paths, globs or folders")
    refused(replace(text_data, kind="texts"), "'texts' is not one of stdlib, text, megatron")
    refused(replace(text_data, kind="blend"), "data=blend needs its parts")
    refused(replace(text_data, kind="blend", blend=[BlendPart(kind="stdlib")]), "takes its files from data.blend")
    blend = replace(text_data, kind="blend", files=[])
    refused(replace(blend, blend=[BlendPart(kind="stdlib", weight=0)]), "weight 0 of the stdlib part must be positive")
    refused(replace(blend, blend=[BlendPart(kind="chat", files=["a.jsonl"])]), "a.jsonl does not exist")
    refused(replace(blend, blend=[BlendPart(kind="preference", files=["a.jsonl"])]), "'preference' is not one of")
    mixed = [BlendPart(kind="megatron", files=[a]), BlendPart(files=text_data.files)]
    refused(replace(blend, blend=mixed), "text together with megatron data needs data.tokenizer")
    refused(replace(text_data, valid_fraction=0.0), "data.valid_fraction=0.0 must lie between 0 and 1")


def test_token_files_that_do_not_fit(text_data, pairs, tmp_path):
    a, _ = pairs
    data = replace(text_data, kind="megatron", files=[a])
    refused(
        data, r"a\.bin contains the token id 99, beyond model\.vocab_size=99; set model\.vocab_size=100", vocab_size=99
    )
    refused(replace(data, document_mask=True), "data.document_mask=true needs data.tokenizer", sequence_length=8)
    negative = write_pair(tmp_path / "negative", [[1, -1]], dtype=np.int32)
    refused(replace(data, files=[negative]), "contains the token id -1; ids cannot be negative")
    large = write_pair(tmp_path / "large", [[1, 450]])
    tokenizer = run(text_data).tokenizer
    refused(
        replace(data, files=[large], tokenizer=tokenizer),
        r"contains the token id 450, but .* has 400 tokens; set data\.tokenizer",
        vocab_size=1000,
    )
    single = write_pair(tmp_path / "single", [[1] * 100])
    refused(replace(data, files=[single]), "a single document cannot be split")
    refused(replace(data, files=[write_pair(tmp_path / "none", [[]])]), "contains no tokens")
