"""What a user may bring, good, odd and broken: `launch.prepare` writes exactly the documents that it holds, and both it
and `launch.data inspect` say what is wrong, and where."""

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from conf.commands import PrepareConfig
from conf.inspect_data_config import InspectDataConfig
from corpus.indexed import read_index
from corpus.tokenizer import Tokenizer
from launch.data import main as inspect
from launch.prepare import main as prepare
from tests.corpus.helpers import token_range, write_pair

EOD = "<|endoftext|>"
TEXTS = [f"line {i} of ünïcode\u2028\U0001f389" for i in range(9)]
ROWS = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
BINARY = r"is binary, or UTF-16: it has NUL bytes"
COMPRESSED = r"has compressed data instead of text: decompress it, or add {} to its name"

GOOD: dict[str, tuple[bytes, list[str], str]] = {
    # name: content, documents, what is said about it
    "crlf.jsonl": (ROWS.replace(b"\n", b"\r\n"), TEXTS, ""),
    "bom.jsonl": (b"\xef\xbb\xbf" + ROWS, TEXTS, ""),
    "blank.jsonl": (b" \t\r\n\n" + ROWS + b"\n\n", TEXTS, ""),
    "no_end.jsonl": (ROWS[:-1], TEXTS, ""),
    "nested.jsonl": (b'{"text": {"a": 1}}\n' + ROWS, TEXTS, r"line 1: field 'text' is dict, not a string"),
    "nulls.jsonl": (ROWS + b'{"text": null}\n' * 4, TEXTS, r"line 10: field 'text' is null.*and 1 more"),
    "numbers.jsonl": (b'{"text": "a", "n": ' + b"9" * 5000 + b', "m": NaN}\n', ["a"], ""),
    "eod.jsonl": (json.dumps({"text": f"a {EOD} b"}).encode(), [f"a {EOD} b"], ""),
    "comma.jsonl": (b'{"text": "a"},\n' + ROWS, TEXTS, r"line 1 is not valid JSON: Extra data, column 14"),
    "zeros.jsonl": (ROWS + b"\0\0\0\n", TEXTS, r"line 10 is not valid JSON"),
    "surrogate.jsonl": (ROWS + b'{"text": "a\\ud800b\\udc00"}\n', [*TEXTS, "a\ufffdb\ufffd"], r"2.*UTF-8.*line 10"),
    "latin.jsonl": (ROWS + b'{"text": "caf\xe9"}\n', [*TEXTS, "caf\ufffd"], r"1.*UTF-8.*line 10"),
    "latin.txt": ("é".encode("cp1252") * 3, ["\ufffd" * 3], r"3.*UTF-8"),
    "huge.jsonl": (json.dumps({"text": "word " * 200_000}).encode() + b"\n" + ROWS, ["word " * 200_000, *TEXTS], ""),
    "members.jsonl.gz": (gzip.compress(ROWS) + gzip.compress(ROWS) + bytes(9), TEXTS + TEXTS, ""),
    "frames.jsonl.zst": (zstandard.compress(ROWS) * 2, TEXTS + TEXTS, ""),
    "streams.jsonl.bz2": (bz2.compress(ROWS) * 2, TEXTS + TEXTS, ""),
    "streams.jsonl.xz": (lzma.compress(ROWS) * 2, TEXTS + TEXTS, ""),
    "cut.jsonl.bz2": (bz2.compress(ROWS) + bz2.compress(ROWS)[:40], TEXTS, r"damaged after line 9: it ends in the mid"),
    "array.json": (b"[" + ROWS.replace(b"\n", b",\n")[:-2] + b"]", TEXTS, ""),
}
BAD = {
    "empty.jsonl": (b"", r"empty\.jsonl is empty"),
    "blank.txt.gz": (gzip.compress(b""), r"no document|there is no text in .*blank\.txt\.gz"),
    "no_text.jsonl": (b'{"text": ""}\n', r"no document|there is no text in .*no_text\.jsonl"),
    "missing.jsonl": (b'{"body": "x"}\n' * 3, r"line 1 has no field 'text'; set text_key to one that it has: body"),
    "utf16.jsonl": (ROWS.decode().encode("utf-16"), r"is in UTF-16, not UTF-8; convert it"),
    "utf16.txt": ("a b".encode("utf-16-le"), BINARY),
    "film.py": (bytes(range(256)), BINARY),
    "gzip.jsonl": (gzip.compress(ROWS), COMPRESSED.format(".gz")),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(ROWS)), COMPRESSED.format(".gz")),
    "zstd.txt": (zstandard.compress(ROWS), COMPRESSED.format(".zst")),
    "bzip.json": (bz2.compress(ROWS), COMPRESSED.format(".bz2")),
    "xz.py": (lzma.compress(ROWS), COMPRESSED.format(".xz")),
    "not.jsonl.gz": (ROWS, r"is damaged after line 0: Error -3 .*incorrect header check"),
    "cut.json": (b'[{"text": "a"}, {"te', r"is not valid JSON: .*line 1, column"),
    "not.parquet": (ROWS, r"is damaged after row 0: Parquet magic bytes not found"),
    "not.arrow": (ROWS, r"is damaged after row 0"),
    "not.wet": (ROWS, r"is damaged after record 0: a record begins with"),
    "table.csv": (ROWS, r"unknown file format; supported are"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "t.json")
    Tokenizer.train(TEXTS, vocab_size=300, eod_token=EOD).save(path)
    return path


def test_what_can_be_used_is_used_and_nothing_else(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = Tokenizer.load(tokenizer, EOD)
    for name, (content, texts, said) in GOOD.items():
        path, made = tmp_path / name, f"{tmp_path}/made_{name}"
        path.write_bytes(content)
        assert prepare(PrepareConfig(input=str(path), output=made, tokenizer=tokenizer)) == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if f"{name}:" in line or f"in {path}" in line]
        found = token_range(made, 0, read_index(made).num_documents).tolist()
        documents: list[list[int]] = [[]]
        for token in found:
            documents[-1].append(token)
            if token == inner.eod_id:
                documents.append([])
        assert [inner.decode(ids[:-1]) for ids in documents[:-1]] == texts, name
        assert inspect(InspectDataConfig(path=str(path))) == 0
        printed = capsys.readouterr().out
        assert f"documents   {len(texts)}\n" in printed, name
        problems = [line for line in printed.splitlines() if line.startswith("problem: ")]
        for lines in (problems, notes if "damaged" not in said else problems):
            assert bool(lines) == bool(said) and re.search(said, "\n".join(lines)), (name, lines)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named(tmp_path: Path, tokenizer: str, name: str) -> None:
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        prepare(PrepareConfig(input=f"{tmp_path}/{name}", output=f"{tmp_path}/made", tokenizer=tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(ValueError, match=rf"has no document that can be used|{said}"):
        inspect(InspectDataConfig(path=f"{tmp_path}/{name}"))


def test_a_link_to_nothing(tmp_path: Path) -> None:
    os.symlink("nowhere.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl does not exist: it is a link to nowhere\.jsonl, which"):
        inspect(InspectDataConfig(path=f"{tmp_path}/a.jsonl"))


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize("number", [-2, 1.5, float("nan"), float("inf")])
def test_numbers_that_are_no_token_ids(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], number: float, with_tokenizer: bool
) -> None:
    floats: dict[str, Any] = {"documents": [[1, 2, 3], [4, number], [number]], "dtype": np.float32}
    prefix = write_pair(tmp_path / "pair", **floats)
    assert inspect(InspectDataConfig(path=prefix, tokenizer=tokenizer if with_tokenizer else None)) == 0
    printed = capsys.readouterr().out
    assert f"problem: 2 x number that is no token id: {prefix}, document 2: {number:.1f}; and 1 more" in printed
    assert re.search(r"ids +1 to 4", printed)
