import bz2
import gzip
import json
import lzma
import re
import sysconfig
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from corpus.documents import SkippedRows, expand, read_documents, standard_library_files
from corpus.readers import compression

TEXTS = ["one", "zwei\nLinien", "", "trois é\U0001f389", "four " * 200]
LINES = [json.dumps({"id": i, "text": text}).encode() for i, text in enumerate(TEXTS)]


def texts_of(path: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in read_documents(str(path), text_key)]


def compress(suffix: str, data: bytes) -> bytes:
    how = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return how.get(Path(suffix).suffix, bytes)(data)


COMPRESSED = [".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"]


@pytest.mark.parametrize("suffix", [".jsonl", *COMPRESSED])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_lines_across_blocks_and_frames(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(compression, "_BLOCK", block)
    path = tmp_path / f"file{suffix}"
    halves = b"\n".join(LINES[:2]) + b"\n\n" + LINES[2][:9], LINES[2][9:] + b"\n" + b"\n".join(LINES[3:])
    path.write_bytes(b"".join(compress(suffix, half) for half in halves))
    assert texts_of(path) == [text for text in TEXTS if text]
    done = [document.done for document in read_documents(str(path), "text")]
    assert done == sorted(done) and done[0] > 0 and done[-1] == 1.0


def test_parquet(tmp_path):
    path = tmp_path / "file.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(5)), "body": TEXTS}), path, row_group_size=2)
    assert texts_of(path, "body") == [text for text in TEXTS if text]


def test_a_txt_file_is_one_document_as_it_is(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes("a\r\n\n é".encode())
    assert texts_of(path) == ["a\r\n\n é"]


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    path = tmp_path / "file.txt"
    # Two bytes that occur in no UTF-8 text, a character cut short, and a U+FFFD that was there before.
    path.write_bytes(b"a\xff\xfeb\xe2\x82" + "c\ufffd".encode())
    (document,) = read_documents(str(path), "text")
    assert document.text == "a\ufffd\ufffdb\ufffdc\ufffd" and document.replaced == 3


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(r'{"text": "a\ud800b \ud83c\udf89"}')
    assert texts_of(path) == ["a\ufffdb \U0001f389"]


DEEP = b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_LINES = {
    b'{"text": ': "line 3 is not valid JSON: Expecting value, column 10",
    b"[1]": "line 3 is a JSON list, not an object",
    b'{"body": "x", "id": 1}': "line 3 has no field 'text'; set text_key to one that it has: body, id",
    b'{"text": null}': "line 3: field 'text' is null, not a string",
    b'{"text": 1' + b"0" * 5000 + b"}": "line 3: field 'text' is float, not a string",
    DEEP: "line 3 is nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_a_bad_line_is_left_out_and_named(tmp_path, line):
    path = tmp_path / "file.jsonl"
    path.write_bytes(LINES[0] + b"\n" + LINES[1] + b"\n" + line + b"\n" + LINES[3] + b"\n")
    skipped = SkippedRows()
    documents = list(read_documents(str(path), "text", skipped=skipped))
    assert [document.text for document in documents] == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert skipped.note("file") == f"file: 1 row skipped (an error with strict=true): {BAD_LINES[line]}"
    with pytest.raises(ValueError, match=re.escape(f"{path} {BAD_LINES[line]}")):
        list(read_documents(str(path), "text", strict=True))
    path.write_bytes(b"\n\n" + line + b"\n" + line)
    with pytest.raises(ValueError, match=re.escape(f"{BAD_LINES[line]}; none of its 2 rows can be used")):
        texts_of(path)


def test_many_bad_lines_are_counted(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + b'{"text": null}\n' * 9)
    skipped = SkippedRows()
    list(read_documents(str(path), "text", skipped=skipped))
    assert skipped.count == 9 and skipped.note("file").endswith(
        "line 4: field 'text' is null, not a string; and 6 more"
    )


def test_an_integer_of_many_digits_in_a_field_that_is_not_read(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"text": "x", "id": ' + b"9" * 5000 + b"}")
    assert texts_of(path) == ["x"]


@pytest.mark.parametrize("suffix", [".jsonl", *COMPRESSED, ".txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    text = b"one" if suffix == ".txt" else LINES[0]
    for mark in (b"\xef\xbb\xbf", b""):
        path.write_bytes(mark + text if suffix == ".txt" else compress(suffix, mark + text))
        assert texts_of(path) == ["one"]
    utf16 = text.decode().encode("utf-16")
    path.write_bytes(utf16 if suffix == ".txt" else compress(suffix, utf16))
    with pytest.raises(ValueError, match="is in UTF-16, not UTF-8; convert it: iconv"):
        texts_of(path)


def test_a_long_zstd_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size, as in a pipe
    path = tmp_path / "file.jsonl.zst"
    path.write_bytes(compressor.compress(LINES[0]) + compressor.flush())
    assert texts_of(path) == ["one"]


def test_a_long_line_takes_linear_time(tmp_path, monkeypatch):
    path = tmp_path / "file.jsonl"
    monkeypatch.setattr(compression, "_BLOCK", 64)
    times = []
    for size in (1, 8):
        path.write_text(json.dumps({"text": "a" * size * 1_000_000}))
        begin = time.process_time()
        assert [len(text) for text in texts_of(path)] == [size * 1_000_000]
        times.append(time.process_time() - begin)
    assert times[1] < 24 * times[0] + 0.1  # 64 times when every block copies the line so far


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_damaged_compressed_files(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    first, second = (compress(suffix, b"\n".join(LINES) + b"\n") for _ in range(2))
    path.write_bytes(first + second[:-6])
    with pytest.raises(ValueError, match=r"file.*is damaged after line (5|6|7|8|9|10): it ends in the middle"):
        texts_of(path)
    for zeros in (100, 3 * compression._BLOCK):  # within a block, and beyond
        path.write_bytes(first + b"\x00" * zeros + first)
        assert len(texts_of(path)) == 8
    path.write_bytes(first + b"\x00 this is something else")
    with pytest.raises(ValueError, match=r"file.*is damaged after line 5"):
        texts_of(path)


def test_damaged_and_unsuitable_parquet(tmp_path):
    path = tmp_path / "file.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["a", None]}), path)
    skipped = SkippedRows()
    assert [document.text for document in read_documents(str(path), "text", skipped=skipped)] == ["a"]
    assert skipped.note("file").endswith("1 row skipped (an error with strict=true): row 2: column 'text' is null")
    with pytest.raises(ValueError, match=r"file.parquet row 2: column 'text' is null"):
        list(read_documents(str(path), "text", strict=True))
    with pytest.raises(ValueError, match="no column 'body'; set text_key to one that it has: n, text"):
        texts_of(path, "body")
    with pytest.raises(ValueError, match="column 'n' does not hold text"):
        texts_of(path, "n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"file.parquet is damaged"):
        texts_of(path)


def test_expand_keeps_the_order_given_and_names_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "c[1].txt", "d.jsonl"):
        (tmp_path / name).write_text("text")
    found = expand([f"{tmp_path}/d.jsonl", f"{tmp_path}/*.txt", f"{tmp_path}/c[1].txt"])
    assert [Path(path).name for path in found] == ["d.jsonl", "a.txt", "b.txt", "c[1].txt"]


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "novels.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "table.csv").write_text("a,b")
    for pattern, message in {
        "novel.txt": r"novel\.txt does not exist; did you mean .*novels\.txt\?",
        "nowhere/deep/a.txt": "does not exist; there is no nowhere in ",
        "*.jsonl": r"\*\.jsonl matches no file",
        "empty.txt": "empty.txt is empty",
        "table.csv": r"table\.csv: unknown file format; supported are \.txt \.jsonl",
        "tables": r"tables has no file that can be read; supported are \.txt",
        "a" * 300 + ".txt": "does not exist: file name too long",
        "a" * 300 + "/b.txt": "does not exist: file name too long",
        "a" * 300 + "*.txt": "matches no file",
    }.items():
        with pytest.raises(ValueError, match=message):
            expand([f"{tmp_path}/{pattern}"])


def test_standard_library_without_tests():
    root = Path(sysconfig.get_path("stdlib"))
    names = {Path(path).relative_to(root).as_posix() for path in standard_library_files()}
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert {path.name for path in root.glob("*.py")} == {name for name in names if "/" not in name}
    assert all((root / name).stat().st_size for name in names)  # an empty one would be reported as unusable
