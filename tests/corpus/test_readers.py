"""Formats of text as users have them; files are written by other programs, or by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from corpus.cache import Cache
from corpus.dataset_specs import DatasetSpec
from corpus.documents import Document, SkippedRows, expand, read_documents, read_rows
from corpus.readers import warc as warc_reader
from corpus.readers.compression import COMPRESSIONS
from corpus.readers.formats import FORMATS, FileFormat, format_of, package_versions
from corpus.text import TextCorpus


def read(path: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in read_documents(str(path), text_key)]


def skipped(path: Path, text_key: str = "text") -> SkippedRows:
    rows = SkippedRows()
    list(read_documents(str(path), text_key, skipped=rows))
    return rows


def test_lines_end_as_on_windows_and_a_mark_is_at_every_begin_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    mark = b"\xef\xbb\xbf"
    path.write_bytes(mark + b'{"text": "a\\r\\nb"}\r\n\r\n' + mark + b'{"text": "c"}\r\n{"text": "d"}')
    assert read(path) == ["a\r\nb", "c", "d"]
    assert skipped(path).count == 0


def test_fields_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"a": {"b": "nested"}, "x": 1},
        {"a.b": "as it is", "a": {"b": "nested"}},
        {"a": None},
        {"a": {"c": "other"}},
        {"a": {"b": ["one", "two"]}},
        {"a": {"b": ["one", None]}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, "a.b") == ["nested", "as it is", "one\ntwo"]
    assert skipped(path, "a.b").first == [
        "line 3 has no field 'a.b'; set text_key to one that it has: a",
        "line 4 has no field 'a.b'; set text_key to one that it has: a.c",
        "line 6: field 'a.b' is list, not a string",
    ]


def test_zstd_frames_that_are_skipped(tmp_path: Path) -> None:
    """As pzstd and the seekable format write them: sizes, and a table of the frames."""
    table = (0x184D2A5E).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"\x00" * 9
    frames = [zstandard.compress(f'{{"text": "{name}"}}\n'.encode()) for name in "ab"]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(table + frames[0] + table + frames[1] + table)
    assert read(path) == ["a", "b"]


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, "b", {"text": "c"}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    assert read(path) == ["a", "c"]
    assert skipped(path).first == [
        "entry 2: field 'text' is null, not a string",
        "entry 3 is a JSON str, not an object",
    ]
    compressed = tmp_path / "b.json.gz"
    compressed.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert read(compressed) == ["a", "b"]
    path.write_text('[{"text": "a"},\n {"text": "b"')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON: .*line 2, column .*has the suffix \.jsonl"):
        read(path)


def columns() -> dict[str, Any]:
    """Columns with the same three texts, and one that is null."""
    texts = ["one", None, "drei é", "four"]
    lists = [["one"], None, ["drei é"], ["four"]]
    return {
        "string": arrow.array(texts),
        "large": arrow.array(texts, arrow.large_string()),
        "view": arrow.array(texts, arrow.string_view()),
        "binary": arrow.array([text and text.encode() for text in texts], arrow.binary()),
        "dictionary": arrow.array(texts).dictionary_encode(),
        "list": arrow.array(lists),
        "large_list": arrow.array(lists, arrow.large_list(arrow.large_string())),
        "fixed_list": arrow.array(lists, arrow.list_(arrow.string(), 1)),
        "in.name": arrow.array(texts),
        "struct": arrow.array([None if text is None else {"deep": {"text": text}} for text in texts]),
    }


NAMES = [*(name for name in columns() if name != "struct"), "struct.deep.text"]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columns_of_all_kinds(tmp_path: Path, kind: str) -> None:
    table = arrow.table(columns())
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=3)
    else:
        new = arrow.ipc.new_file if kind == "file" else arrow.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    for name in NAMES:
        assert read(path, name) == ["one", "drei é", "four"], name
        assert skipped(path, name).first == [f"row 2: column {name!r} is null"]
    rows = list(read_rows(str(path)))
    assert [row.where for row in rows] == ["row 1", "row 2", "row 3", "row 4"]
    assert rows[2].value == table.slice(2, 1).to_pylist()[0]
    assert 0 < rows[0].done < rows[-1].done == 1.0
    with pytest.raises(ValueError, match=r"no column 'struct.text'; .*in.name, struct.deep$"):
        read(path, "struct.text")
    with pytest.raises(ValueError, match="column 'struct' does not hold text"):
        read(path, "struct")


def test_an_arrow_stream_that_is_cut_off(tmp_path: Path) -> None:
    table, path = arrow.table({"text": ["a", "b"]}), tmp_path / "a.arrow"
    with arrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])  # between two messages
    with pytest.raises(ValueError, match=r"a\.arrow is cut off after row 2: the end of the stream is missing"):
        read(path)
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.arrow is damaged after row 1"):
        read(path)


def save(folder: Path, texts: list[str], files: int = 2) -> None:
    """A folder as `datasets` 2 to 5 save one."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        table = arrow.table({"text": texts[i::files]})
        with arrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    save(tmp_path / "one", ["a", "b", "c"])
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"left behind by map()")
    files = expand([str(tmp_path / "one")])
    assert [Path(path).name for path in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [text for path in files for text in read(Path(path))] == ["a", "c", "b"]

    for split in ("train", "test"):
        save(tmp_path / "splits" / split, [split])
    splits = tmp_path / "splits" / "dataset_dict.json"
    splits.write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"2 splits; name those to be read: .*splits/train, .*splits/test"):
        expand([str(tmp_path / "splits")])
    assert [read(Path(path)) for path in expand([f"{tmp_path}/splits/test"])] == [["test"], []]
    splits.write_text('{"splits": ["test"]}')
    assert expand([str(tmp_path / "splits")]) == expand([f"{tmp_path}/splits/test"])
    splits.write_text("{")
    with pytest.raises(ValueError, match=r"dataset_dict.json does not describe a data set"):
        expand([str(tmp_path / "splits")])


def test_what_datasets_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(2500)]
    made = datasets.Dataset.from_dict({"text": texts, "n": list(range(2500))})
    made.filter(lambda row: row["n"] % 2 == 0).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    found = [text for path in expand([str(tmp_path / "saved")]) for text in read(Path(path))]
    assert found == texts[::2]
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "dictionary"))
    assert len(expand([str(tmp_path / "dictionary")])) == 1


def warc(kind: str, content: bytes, content_type: str, **headers: str) -> bytes:
    """A record, by the standard."""
    named = {"WARC-Type": kind, "Content-Type": content_type, "Content-Length": str(len(content)), **headers}
    lines = ["WARC/1.0", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + content + b"\r\n\r\n"


HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: text/%b; charset=utf-8\r\n%b\r\ncontent\r\n\r\nof it"


def test_web_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warc_reader, "html_extractor", lambda: None)  # as where trafilatura is not installed
    page = {"WARC_Target_URI": "http://a.example/", "WARC_Date": "2024-01-01T00:00:00Z"}
    records = [
        warc("warcinfo", b"isPartOf: CC-MAIN\r\n", "application/warc-fields"),
        warc("conversion", "erste Seite\r\n\r\nmit é\n".encode(), "text/plain", **page),
        warc("conversion", b"WARC/1.0 is a format\xff", "text/plain", WARC_Identified_Content_Language="eng"),
        warc("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        warc("response", HTTP % (b"html", b""), "application/http; msgtype=response", **page),
        warc("response", HTTP % (b"plain", b""), "application/http; msgtype=response"),
        warc("response", HTTP % (b"plain", b"Content-Encoding: gzip\r\n"), "application/http; msgtype=response"),
        warc("metadata", b"x: y\r\n", "application/warc-fields"),
    ]
    path = tmp_path / "CC-MAIN-2024.warc.wet.gz"
    path.write_bytes(b"".join(map(gzip.compress, records)))  # a member per record
    documents = list(read_documents(str(path), "body"))
    assert [d.text for d in documents] == [
        "erste Seite\r\n\r\nmit é\n",
        "WARC/1.0 is a format\ufffd",
        "content\r\n\r\nof it",
    ]
    assert [d.replaced for d in documents] == [0, 1, 0]
    assert skipped(path).first == [
        "record 5 is text/html, not text/plain; use the .wet file of this archive, or: bash launch/setup.sh data",
        "record 7 is encoded (gzip)",
    ]
    first, second = (row.value for row in list(read_rows(str(path)))[:2])
    assert isinstance(first, dict) and first["url"] == "http://a.example/" and first["date"] == "2024-01-01T00:00:00Z"
    assert isinstance(second, dict) and second["language"] == "eng"

    plain = tmp_path / "a.warc"
    for cut in (10, 30):  # in the content, and in the headers before it
        plain.write_bytes(b"".join(records[:3])[:-cut])
        with pytest.raises(ValueError, match=r"a\.warc is damaged after record 2: it ends in the middle of a record"):
            read(plain)
    plain.write_bytes(records[1] + b"<html>")
    with pytest.raises(ValueError, match=r"damaged after record 1: a record begins with b'<html>' instead of WARC"):
        read(plain)


PAGE = """<html><head><title>T</title></head><body><nav><a href="/">Home</a> <a href="/shop">Shop</a></nav><article>
<h1>How routers work</h1><p>A router decides which expert a token is sent to. It computes a score for each of them.</p>
<p>Every expert has a capacit\u00e9, and tokens beyond it are dropped, unless the layer is dropless.</p></article>
<footer>Cookies and imprint</footer></body></html>"""


def html_archive(path: Path) -> Path:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
    pages = (PAGE.encode(), b"<html><body></body></html>")
    path.write_bytes(b"".join(warc("response", head + page, "application/http; msgtype=response") for page in pages))
    return path


def test_html_in_web_archives(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", reason="trafilatura is not installed: bash launch/setup.sh data")
    path = html_archive(tmp_path / "a.warc")
    (document,) = read_documents(str(path), "text")
    assert document.text.startswith("How routers work\nA router decides") and document.text.endswith("is dropless.")
    assert "capacit\u00e9" in document.text and "Shop" not in document.text and "imprint" not in document.text
    assert skipped(path).first == ["record 2 is HTML in which trafilatura finds no text"]


def test_what_extracts_html_is_a_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = html_archive(tmp_path / "a.warc")
    monkeypatch.setattr(warc_reader, "_extractor_version", lambda: "trafilatura 1.0")
    monkeypatch.setattr(warc_reader, "html_extractor", lambda: lambda content: "text" if b"nav" in content else None)
    assert read(path) == ["text"]
    assert skipped(path).first == ["record 2 is HTML in which trafilatura finds no text"]
    assert package_versions([str(path), str(path), "a.warc.wet.gz", "b.jsonl"]) == ["trafilatura 1.0"]
    corpus, cache = TextCorpus(DatasetSpec("text", [str(path)], 1.0, 0.0), "text"), Cache(str(tmp_path / "cache"))
    assert corpus.identity(cache)[-1] == "trafilatura 1.0"
    monkeypatch.setattr(warc_reader, "html_extractor", lambda: None)
    assert package_versions([str(path)]) == [] and "trafilatura 1.0" not in corpus.identity(cache)


def test_a_folder_of_source_code(tmp_path: Path) -> None:
    sources = {
        "a/main.rs": "fn main() {}",
        "a/Makefile": "all:",
        "b/x.PY": "x = 1",
        "b/film.ts": "G\0\x40",
        "b/empty.py": "",
        "package.json": "{}",
        "picture.png": "...",
        "README": "...",
        ".git/hook.sh": "no",
        "node_modules/m/index.js": "no",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = expand([str(tmp_path)])
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == [
        "a/Makefile",
        "a/main.rs",
        "b/film.ts",
        "b/x.PY",
    ]
    documents = [document for path in found for document in read_documents(path, "text")]
    assert [(d.language, d.text) for d in documents] == [
        ("Makefile", "all:"),
        ("Rust", "fn main() {}"),
        ("Python", "x = 1"),
    ]
    assert skipped(tmp_path / "b/film.ts").first == ["is binary, or UTF-16: it has NUL bytes"]
    with pytest.raises(ValueError, match=r"film\.ts is binary"):
        list(read_documents(found[2], "text", strict=True))


def test_a_folder_of_data_has_a_readme_but_no_code(tmp_path: Path) -> None:
    for name in ("README.md", "part-1.jsonl", "more/part-2.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}')
    assert [Path(path).name for path in expand([str(tmp_path)])] == ["part-2.jsonl", "notes.txt", "part-1.jsonl"]
    (tmp_path / "load.py").write_text("import datasets")
    with pytest.raises(
        ValueError, match=r"has rows \(.*part-2\.jsonl\) and source code \(.*load\.py\): name the files"
    ):
        expand([str(tmp_path)])


def test_empty_files_among_others_are_left_out(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", ""), ("b.jsonl", '{"text": "b"}')):
        (tmp_path / name).write_text(text)
    assert expand([f"{tmp_path}/*.jsonl"]) == [f"{tmp_path}/b.jsonl"]
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl is empty, and so are all files of .*\*\.jsonl"):
        expand([f"{tmp_path}/*.jsonl"])


def test_the_format_is_known_by_the_name() -> None:
    names = {
        "a.txt": "text",
        "CMakeLists.txt": "code",
        "a.jsonl.xz": "jsonl",
        "c4-train.00000-of-01024.json.gz": "json",
        "a.parquet": "parquet",
        "CC-MAIN.warc.wet.gz": "warc",
        "a.tar.gz": None,
        "a.parquet.gz": None,
        "gz": None,
        ".gz": None,
    }
    found = {name: entry and entry.name for name in names for entry in [format_of(f"/data/{name}")]}
    assert found == names
    assert all(format_of(f"a.txt{suffix}") for suffix in COMPRESSIONS)


def test_a_format_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="mbox: neither rows nor documents"):
        FORMATS.add(FileFormat("mbox", (".mbox",)))
    with pytest.raises(ValueError, match="mbox: a suffix begins with a dot"):
        FORMATS.add(FileFormat("mbox", ("mbox",), documents=lambda path, key: iter([Document("", 0, 1.0)])))
